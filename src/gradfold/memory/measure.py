"""A measurement of memory: the most that was in use while a function ran, and what it was for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.memory.system import high_water_mark_bytes, reset_high_water_mark
from gradfold.memory.tracker import MemoryBreakdown, MemoryTracker, highest

__all__ = ["PeakMemory", "measure_peak"]


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that was in use while something ran.

    Measured by "tensor storage" (what operators made, to the byte, without what kernels took for themselves) or by the
    "CUDA allocator" (all that was allocated; what kernels took is among the temporaries).
    """

    breakdown: MemoryBreakdown  # bytes at that moment, by what they were for
    by_phase: Mapping[str, MemoryBreakdown]  # "forward and backward", and "update" where an optimizer stepped
    measured_by: str
    high_water_mark_bytes: int  # physical memory of the whole process; 0 where it is not known

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were in use at once."""
        return self.breakdown.total

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"peak_bytes": self.peak_bytes, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PeakMemory:
        """The value from `to_json`."""
        by_phase = {phase: MemoryBreakdown(**found) for phase, found in data["by_phase"].items()}
        breakdown = MemoryBreakdown(**data["breakdown"])
        return cls(breakdown, by_phase, data["measured_by"], data["high_water_mark_bytes"])


def measure_peak(
    fn: Callable[[], object],
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    ignore: Iterable[Tensor] = (),
) -> PeakMemory:
    """Call a function and measure the most memory that tensors take meanwhile.

    On a CPU every storage is counted from the operator that makes it until nothing refers to it: exact, and the same in
    every run. On CUDA the peak is that of the caching allocator. Operators take longer meanwhile (some 10 microseconds
    each) and leave a note of some hundred bytes, so measure a few updates, not an epoch, and do not time them.

    Args:
        fn: what to run, such as `lambda: step(batch)`.
        model: its parameters, buffers and gradients count from the start.
        optimizer: its state counts from the start. What else was there before counts where `fn` uses it.
        ignore: tensors not to count, such as a data set on the host that batches are taken from.

    >>> import torch, gradfold
    >>> model = torch.nn.Linear(1000, 1000)
    >>> def train():
    ...     model(torch.ones(10, 1000)).square().mean().backward()
    >>> peak = gradfold.measure_peak(train, model=model)
    >>> peak.breakdown.parameters, peak.breakdown.gradients
    (4004000, 4004000)
    """
    gc.collect()
    tracker = MemoryTracker(model, optimizer, ignore)
    device = _device(model)
    reset_high_water_mark()
    if device is not None:
        torch.cuda.reset_peak_memory_stats(device)
    with tracker:
        fn()
    by_phase, mark = tracker.trace.peaks(), high_water_mark_bytes()
    breakdown = highest(by_phase.values())
    if device is None:
        return PeakMemory(breakdown, by_phase, "tensor storage", mark)
    # What only the allocator knows: workspaces, rounding, other tensors.
    more = torch.cuda.max_memory_allocated(device) - breakdown.total
    breakdown = replace(breakdown, temporaries=max(breakdown.temporaries + more, 0))
    return PeakMemory(breakdown, by_phase, "CUDA allocator", mark)


def _device(model: nn.Module | None) -> torch.device | None:
    """The CUDA device to ask, if there is one: the model's, else the current one where it holds anything."""
    parameter = None if model is None else next(model.parameters(), None)
    if parameter is not None:
        return parameter.device if parameter.is_cuda else None
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return torch.device("cuda", torch.cuda.current_device())
    return None
