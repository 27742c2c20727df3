"""Auto, the option by which an accumulator picks its own micro-batch size, and the choice that comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gradfold.errors import OptionError
from gradfold.memory.budget import read_bytes

__all__ = ["Auto", "MicroBatchChoice", "SizeTiming"]


@dataclass(frozen=True)
class Auto:
    """Pick the micro-batch size: the fastest of those that fit. `"auto"` is `Auto()`.

    Args:
        memory: the most that the process (on a CPU) or the device may use, such as "16GiB". None: what is free.
        margin: the share that is added to predictions of memory. None: 10 %.
        seconds: for how long sizes are timed at most, after a prediction of some seconds.
        cache: whether a choice is kept on disk for the next start with the same model, shapes, dtypes, device, versions
            and options: in `$GRADFOLD_CACHE_DIR`, else in `$XDG_CACHE_HOME/gradfold`, else in `~/.cache/gradfold`.

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
            raise OptionError(f"seconds={self.seconds!r}; expected a number of seconds to time sizes, such as 4.0.")


def read_auto(option: str | Auto) -> Auto:
    """The `Auto` that an option means; OptionError for any other text."""
    if isinstance(option, Auto):
        return option
    if option == "auto":
        return Auto()
    raise OptionError(
        f'micro_batch_size={option!r}; expected a number of rows to run at once, "auto", an Auto, or None for the '
        "unchanged batch."
    )


@dataclass(frozen=True)
class SizeTiming:
    """The speed of one size in forward and backward passes."""

    micro_batch_size: int
    samples_per_s: float  # median over the rounds in which it ran
    ratio: float  # of its pace to that of the fastest size in the same round, median
    num_rounds: int  # slower sizes are pruned on the way


@dataclass(frozen=True)
class MicroBatchChoice:
    """The size that was chosen, and why."""

    micro_batch_size: int
    reason: str
    timings: tuple[SizeTiming, ...]  # by size
    num_rows: int  # of the batch for which it was chosen
    largest_fitting: int  # the largest candidate
    peak_bytes: int  # predicted for forward and backward; 0 where nothing could be predicted
    elapsed_s: float
    is_cached: bool = False  # read from disk, timings of that machine included

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
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MicroBatchChoice:
        """The choice from `to_json`."""
        timings = tuple(SizeTiming(**timing) for timing in data["timings"])
        return cls(**{**data, "timings": timings})
