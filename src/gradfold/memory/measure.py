"""A measurement of memory: the most that was in use while a function ran, and what it was for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.memory.system import high_water_mark_bytes, reset_high_water_mark
from gradfold.memory.trace import MemoryBreakdown
from gradfold.memory.tracker import MemoryTracker

__all__ = ["PeakMemory", "measure_peak"]


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that was in use while something ran.

    Attributes:
        make_up: bytes at that moment, by what they were for.
        by_phase: the same for each phase alone: "forward and backward", and "update" where an optimizer stepped.
        measured_by: "tensor storage" (every tensor that operators made, to the byte; what kernels took for themselves
            is not in it) or "CUDA allocator" (all that was allocated, with what kernels took among the temporaries).
        high_water_mark_bytes: the most physical memory of the whole process meanwhile: torch, Python and all that the
            heap has not given back included. 0 where the system does not say.
    """

    make_up: MemoryBreakdown
    by_phase: Mapping[str, MemoryBreakdown]
    measured_by: str
    high_water_mark_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes that were in use at once."""
        return self.make_up.total

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "peak_bytes": self.peak_bytes,
            "make_up": self.make_up.to_json(),
            "by_phase": {phase: found.to_json() for phase, found in self.by_phase.items()},
            "measured_by": self.measured_by,
            "high_water_mark_bytes": self.high_water_mark_bytes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PeakMemory:
        """The value from `to_json`."""
        return cls(
            MemoryBreakdown(**data["make_up"]),
            {phase: MemoryBreakdown(**found) for phase, found in data["by_phase"].items()},
            data["measured_by"],
            data["high_water_mark_bytes"],
        )


def measure_peak(
    fn: Callable[[], object],
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    ignore: Iterable[Tensor] = (),
) -> PeakMemory:
    """Call a function and measure the most memory that tensors take meanwhile.

    On a CPU every storage is counted from the operator that makes it until nothing refers to it: exact, and the same in
    every run. On CUDA the peak is that of the caching allocator. What was there before counts where the function uses
    it, and where it belongs to `model` or `optimizer`. Operators take longer meanwhile (some 10 microseconds each), so
    do not time the same call; a note of some hundred bytes is kept on every tensor made, so measure a few updates, not
    an epoch.

    Args:
        fn: what to run, such as `lambda: step(batch)`.
        model: whose parameters, buffers and gradients are there already.
        optimizer: whose state is there already.
        ignore: tensors that are not to count, such as a data set on the host that batches are taken from.

    >>> import torch, gradfold
    >>> model = torch.nn.Linear(1000, 1000)
    >>> def train():
    ...     model(torch.ones(10, 1000)).square().mean().backward()
    >>> peak = gradfold.measure_peak(train, model=model)
    >>> peak.make_up.parameters, peak.make_up.gradients
    (4004000, 4004000)
    """
    gc.collect()
    tracker = MemoryTracker()
    tracker.know(ignore, "ignored")
    if model is not None:
        tracker.know_model(model)
    if optimizer is not None:
        tracker.know_optimizer(optimizer)
    device = _device(model)
    reset_high_water_mark()
    if device is not None:
        torch.cuda.reset_peak_memory_stats(device)
    with tracker:
        fn()
    by_phase = tracker.ledger.peaks()
    make_up = max(by_phase.values(), key=lambda found: found.total)
    if device is None:
        return PeakMemory(make_up, by_phase, "tensor storage", high_water_mark_bytes())
    return PeakMemory(
        _as_allocated(make_up, torch.cuda.max_memory_allocated(device)),
        by_phase,
        "CUDA allocator",
        high_water_mark_bytes(),
    )


def _device(model: nn.Module | None) -> torch.device | None:
    """The CUDA device to ask, if there is one: the model's, else the current one where it holds anything."""
    parameter = None if model is None else next(model.parameters(), None)
    if parameter is not None:
        return parameter.device if parameter.is_cuda else None
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        return torch.device("cuda", torch.cuda.current_device())
    return None


def _as_allocated(make_up: MemoryBreakdown, peak_bytes: int) -> MemoryBreakdown:
    """The make-up with what only the allocator knows among the temporaries: workspaces, rounding, other tensors."""
    found = make_up.to_json()
    found["temporaries"] = max(found["temporaries"] + peak_bytes - make_up.total, 0)
    return MemoryBreakdown(**found)
