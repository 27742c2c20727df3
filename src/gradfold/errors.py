"""What can go wrong, as one tree.

GradfoldError (Exception)
├── OptionError | WeightError | NonFiniteGradientError | BackwardError | DataError (ValueError)
├── BatchError (ValueError)
│   └── EmptyBatchError (BatchError)
├── ModelError (ValueError)
│   └── BatchNormError | HookError | PaddingError | DistributedError (ModelError)
├── LossError (ValueError)
│   └── NonFiniteLossError | NotDecomposableError | RecomputeError (LossError)
├── DoesNotFitError | WindowError (RuntimeError)
├── TrainStepError (TypeError)
└── WorkloadError (ValueError)

Every message says what was given, what was expected and what to write instead. A class carries the facts of its
message as attributes where a program could use them, and the exit code of a command that ends with it: 2 for
OptionError and WorkloadError, else 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(eq=False, repr=False)  # so that errors can be pickled with their facts: all of them are `args`
class GradfoldError(Exception):
    """The base of all errors that gradfold raises on purpose."""

    message: str
    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        return self.message


class OptionError(GradfoldError, ValueError):
    """An argument has a value that cannot work."""

    exit_code = 2


class BatchError(GradfoldError, ValueError):
    """The batch cannot be split into micro-batches by rows."""


class EmptyBatchError(BatchError):
    """The batch has no rows. On one rank of several it weighs nothing, where rows do not depend on each other."""


class ModelError(GradfoldError, ValueError):
    """Gradients of the model cannot be accumulated."""


@dataclass(eq=False, repr=False)
class BatchNormError(ModelError):
    """BatchNorm layers would see a micro-batch where the whole batch was meant.

    Attributes:
        layers: names of the layers in the model.
    """

    layers: tuple[str, ...]


@dataclass(eq=False, repr=False)
class HookError(ModelError):
    """A hook on a parameter would act on the gradient of each micro-batch.

    Attributes:
        parameters: names of the parameters that carry such hooks.
    """

    parameters: tuple[str, ...]


@dataclass(eq=False, repr=False)
class PaddingError(ModelError):
    """The gradient depends on how far rows are padded, so a token budget, which pads less, would change it.

    Attributes:
        layer: name of the first layer whose output does, where there is one.
    """

    layer: str | None


class DistributedError(ModelError):
    """Several processes train together in a way that is not supported, or another one of them has failed."""


class LossError(GradfoldError, ValueError):
    """`loss_fn` returned something that is not a loss, or a metric that cannot be combined."""


@dataclass(eq=False, repr=False)
class NonFiniteLossError(LossError):
    """The loss of a micro-batch is NaN or infinite.

    Attributes:
        micro_batch: index of the first such micro-batch in the window.
        term: name of the loss term ("loss" for an unnamed one).
        value: the value.
    """

    micro_batch: int
    term: str
    value: float


@dataclass(eq=False, repr=False)
class NotDecomposableError(LossError):
    """The gradient of a batch is not the weighted mean of the gradients of its parts, so it cannot be accumulated.

    Attributes:
        cause: "weights" (another weighting fits), "sum" (not a mean), "mean" (not a sum, with weight "sum"),
            "grad_output" (the backward pass ignores its incoming gradient), "empty" (a mean over nothing in a part),
            "batch_norm", "state" (of a layer, moved by forward passes) or "coupled" (samples that depend on each
            other); from `Verdict.raise_if_wrong` also "random", "other_model", "non_finite", "fails", "padding",
            "rounding" and "unknown", as its text explains.
        term: name of the loss term ("loss" for an unnamed one).
        weight: the weight that fits, as Python, where one was found.
    """

    cause: str
    term: str
    weight: str | None = None


@dataclass(eq=False, repr=False)
class RecomputeError(LossError):
    """The statistics of a two-phase loss differed when a micro-batch ran again.

    Attributes:
        micro_batch: index of the micro-batch in the window.
        deviation: how far they were off, relative.
    """

    micro_batch: int
    deviation: float


class WeightError(GradfoldError, ValueError):
    """A weight is negative, not finite or not a number, or its name fits no loss term or metric."""


@dataclass(eq=False, repr=False)
class NonFiniteGradientError(GradfoldError, ValueError):
    """The gradient of a micro-batch is NaN or infinite, though its loss is finite.

    Attributes:
        micro_batch: index of the first such micro-batch in the window; None where only the sum of all is.
        rows: its rows in the batch; all of them where there is no such micro-batch.
        parameters: names of the parameters with such a gradient.
    """

    micro_batch: int | None
    rows: Sequence[int]
    parameters: tuple[str, ...]


@dataclass(eq=False, repr=False)
class DoesNotFitError(GradfoldError, RuntimeError):
    """Out of memory, and running fewer rows at once cannot help.

    Attributes:
        sizes: the numbers of rows (padded tokens with a `TokenBudget`) that were tried at once, in order.
    """

    sizes: tuple[int, ...]


@dataclass(eq=False, repr=False)
class BackwardError(GradfoldError, ValueError):
    """The function given as `backward=` scales gradients by itself.

    Attributes:
        factor: what it multiplied the probe's gradient by.
    """

    factor: float


class WindowError(GradfoldError, RuntimeError):
    """A loop body left a micro-batch out or used its window out of order; or a window is inside another's loss_fn."""


class TrainStepError(GradfoldError, TypeError):
    """The optimizer or the scheduler cannot be driven by `TrainStep`."""


class DataError(GradfoldError, ValueError):
    """Data files are missing, damaged, or not in the expected format."""


class WorkloadError(GradfoldError, ValueError):
    """A workload cannot be found or built."""

    exit_code = 2


_CPU_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # Windows
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN does not say why; convolutions end so under a limit
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is an out-of-memory error, after which fewer rows may fit.

    Accelerators raise `torch.OutOfMemoryError`, Python a `MemoryError`, c10's CPU allocator a `RuntimeError` known by
    its text. The kernel's out-of-memory killer ends a process without an error, which cannot be caught.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_TEXTS)
