"""gradfold: the gradient of a batch that does not fit in memory, exactly, for PyTorch."""

from gradfold import losses as losses
from gradfold.accumulator import Accumulator as Accumulator
from gradfold.coupled.convert import convert_batch_norm as convert_batch_norm
from gradfold.coupled.dropout import convert_dropout as convert_dropout
from gradfold.coupled.keyed_dropout import keyed_dropout as keyed_dropout
from gradfold.coupled.two_phase import TwoPhaseLoss as TwoPhaseLoss
from gradfold.errors import BackwardError as BackwardError
from gradfold.errors import BatchError as BatchError
from gradfold.errors import BatchNormError as BatchNormError
from gradfold.errors import DataError as DataError
from gradfold.errors import DoesNotFitError as DoesNotFitError
from gradfold.errors import GradfoldError as GradfoldError
from gradfold.errors import HookError as HookError
from gradfold.errors import LossError as LossError
from gradfold.errors import ModelError as ModelError
from gradfold.errors import NonFiniteGradientError as NonFiniteGradientError
from gradfold.errors import NonFiniteLossError as NonFiniteLossError
from gradfold.errors import NotDecomposableError as NotDecomposableError
from gradfold.errors import OptionError as OptionError
from gradfold.errors import PaddingError as PaddingError
from gradfold.errors import RanksError as RanksError
from gradfold.errors import ReplayError as ReplayError
from gradfold.errors import TrainStepError as TrainStepError
from gradfold.errors import WeightError as WeightError
from gradfold.errors import WindowError as WindowError
from gradfold.errors import WorkloadError as WorkloadError
from gradfold.length_plan import StepCost as StepCost
from gradfold.loader import LoopWindow as LoopWindow
from gradfold.loader import Window as Window
from gradfold.loader import windows as windows
from gradfold.memory.measure import PeakMemory as PeakMemory
from gradfold.memory.measure import measure_peak as measure_peak
from gradfold.precision import Precision as Precision
from gradfold.recovery import Recovery as Recovery
from gradfold.token_budget import TokenBudget as TokenBudget
from gradfold.train_step import StepResult as StepResult
from gradfold.train_step import TrainStep as TrainStep
from gradfold.verification.verdict import Verdict as Verdict
from gradfold.verification.verify import verify as verify
from gradfold.weight import TokenCount as TokenCount
from gradfold.weight import token_count as token_count
from gradfold.window import WindowResult as WindowResult
from gradfold.workloads.workload import Workload as Workload

__version__ = "0.1.0.dev0"
