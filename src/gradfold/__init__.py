"""gradfold: the gradient of a batch that does not fit in memory, exactly, for PyTorch.

Users start with `Accumulator`; readers of the code with `accumulator.py`, `engine/window.py` and docs/design.md.
"""

__version__ = "0.1.0.dev0"

from gradfold import losses as losses
from gradfold.accumulator import Accumulator as Accumulator
from gradfold.batch.batching import Batching as Batching
from gradfold.batch.batching import Grouped as Grouped
from gradfold.batch.batching import Stacked as Stacked
from gradfold.batch.packed import Packed as Packed
from gradfold.batchnorm.convert import convert_batch_norm as convert_batch_norm
from gradfold.dropout import convert_dropout as convert_dropout
from gradfold.dropout import counter_based_dropout as counter_based_dropout
from gradfold.engine.result import Recovery as Recovery
from gradfold.engine.result import WindowResult as WindowResult
from gradfold.errors import BackwardError as BackwardError
from gradfold.errors import BatchError as BatchError
from gradfold.errors import BatchNormError as BatchNormError
from gradfold.errors import DataError as DataError
from gradfold.errors import DistributedError as DistributedError
from gradfold.errors import DoesNotFitError as DoesNotFitError
from gradfold.errors import EmptyBatchError as EmptyBatchError
from gradfold.errors import GradfoldError as GradfoldError
from gradfold.errors import HookError as HookError
from gradfold.errors import LossError as LossError
from gradfold.errors import ModelError as ModelError
from gradfold.errors import NonFiniteGradientError as NonFiniteGradientError
from gradfold.errors import NonFiniteLossError as NonFiniteLossError
from gradfold.errors import NotDecomposableError as NotDecomposableError
from gradfold.errors import OptionError as OptionError
from gradfold.errors import PaddingError as PaddingError
from gradfold.errors import RecomputeError as RecomputeError
from gradfold.errors import TrainStepError as TrainStepError
from gradfold.errors import WeightError as WeightError
from gradfold.errors import WindowError as WindowError
from gradfold.errors import WorkloadError as WorkloadError
from gradfold.memory.auto import Auto as Auto
from gradfold.memory.auto import MicroBatchChoice as MicroBatchChoice
from gradfold.memory.auto import SizeTiming as SizeTiming
from gradfold.memory.measure import PeakMemory as PeakMemory
from gradfold.memory.measure import measure_peak as measure_peak
from gradfold.memory.plan import Plan as Plan
from gradfold.memory.plan import PlanRow as PlanRow
from gradfold.memory.plan import plan as plan
from gradfold.packing.packer import StepCost as StepCost
from gradfold.packing.token_budget import TokenBudget as TokenBudget
from gradfold.precision import Precision as Precision
from gradfold.state.snapshot import is_probing as is_probing
from gradfold.train_step import StepResult as StepResult
from gradfold.train_step import TrainStep as TrainStep
from gradfold.twophase.loss import TwoPhaseLoss as TwoPhaseLoss
from gradfold.verification.verdict import Verdict as Verdict
from gradfold.verification.verify import verify as verify
from gradfold.weights import TokenCount as TokenCount
from gradfold.weights import token_count as token_count
from gradfold.windows import LoadedWindow as LoadedWindow
from gradfold.windows import LoopWindow as LoopWindow
from gradfold.windows import windows as windows
from gradfold.workloads.workload import Workload as Workload
