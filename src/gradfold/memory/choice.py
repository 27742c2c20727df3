"""A choice: the micro-batch size that an accumulator has set itself, with the reason and what was timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["MicroBatchChoice", "SizeTiming"]


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
