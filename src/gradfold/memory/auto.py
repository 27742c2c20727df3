"""Auto: how a micro-batch size is to set itself.

A choice: the micro-batch size that an accumulator has set itself, with the reason and what was timed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from gradfold.errors import OptionError
from gradfold.memory.amount import read_bytes
from gradfold.packing.token_budget import TokenBudget

__all__ = ["Auto", "MicroBatchChoice", "SizeTiming"]


@dataclass(frozen=True)
class Auto:
    """Have the micro-batch size found: the fastest of those that fit. `"auto"` is `Auto()`.

    Args:
        memory: the most that the process (on a CPU) or the device may use, such as "16GiB". None: what is free.
        margin: the share that is added to predictions of memory. None: 10 %.
        seconds: for how long sizes are timed at most, after a prediction of some seconds.
        cache: whether a choice is kept on disk for the next start with the same model, shapes, dtypes, device and
            versions: in `$GRADFOLD_CACHE_DIR`, else in `$XDG_CACHE_HOME/gradfold`, else in `~/.cache/gradfold`.

    Raises:
        OptionError: an argument cannot work.

    >>> import torch, gradfold
    >>> model = torch.nn.Linear(10, 1)
    >>> def loss_fn(model, batch):
    ...     return model(batch).square().mean()
    >>> auto = gradfold.Auto(memory="4GiB", seconds=0.1, cache=False)
    >>> accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=auto)
    >>> _ = accumulator.backward(torch.randn(256, 10))
    >>> 1 <= accumulator.micro_batch_choice.micro_batch_size <= 256
    True
    """

    memory: int | str | None = None
    margin: float | None = None
    seconds: float = 4.0
    cache: bool = True

    def __post_init__(self) -> None:
        if self.memory is not None:
            read_bytes(self.memory)
        if isinstance(self.seconds, bool) or not isinstance(self.seconds, (int, float)) or not self.seconds > 0:
            raise OptionError(f"seconds={self.seconds!r}; expected how long sizes may be timed, such as 4.0.")


MicroBatchSize: TypeAlias = int | TokenBudget | Literal["auto"] | Auto | None


def read_auto(option: str | Auto) -> Auto:
    """The `Auto` that an option means.

    Raises:
        OptionError: it is none.
    """
    if isinstance(option, Auto):
        return option
    if option == "auto":
        return Auto()
    raise OptionError(
        f'micro_batch_size={option!r}; expected the number of rows to run at once, "auto", an Auto, or None for the '
        "batch as it is given."
    )


@dataclass(frozen=True)
class SizeTiming:
    """How fast one size was.

    Attributes:
        micro_batch_size: rows at once.
        samples_per_s: median over the rounds in which it ran, forward and backward.
        ratio: of its pace to that of the fastest size in the same round, median.
        num_rounds: in which it ran; slower sizes drop out on the way.
    """

    micro_batch_size: int
    samples_per_s: float
    ratio: float
    num_rounds: int


@dataclass(frozen=True)
class MicroBatchChoice:
    """The size that was chosen.

    Attributes:
        micro_batch_size: rows that are run at once.
        reason: in words.
        timings: what was timed, by size; on this machine, or where the cached choice was made.
        num_rows: of the batch for which it was chosen.
        largest_fitting: the largest size that was considered.
        peak_bytes: predicted for it, tensors of forward and backward; 0 where nothing could be predicted.
        elapsed_s: seconds that the search took.
        is_cached: whether an earlier start had searched.
    """

    micro_batch_size: int
    reason: str
    timings: tuple[SizeTiming, ...]
    num_rows: int
    largest_fitting: int
    peak_bytes: int
    elapsed_s: float
    is_cached: bool = False

    @property
    def is_bound_by_rows(self) -> bool:
        """Whether the batch had no more rows to choose, so that a larger one may want more."""
        return self.micro_batch_size == self.num_rows

    @property
    def is_bound_by_memory(self) -> bool:
        """Whether more rows might have been faster, and did not fit."""
        return self.micro_batch_size == self.largest_fitting < self.num_rows

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"timings": [asdict(timing) for timing in self.timings]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MicroBatchChoice:
        """The choice from `to_json`."""
        timings = tuple(SizeTiming(**timing) for timing in data["timings"])
        return cls(**{**data, "timings": timings})
