"""What an arm costs: seconds by phase and peak memory, measured inside its process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from gradfold.memory.system import high_water_mark_bytes, reset_high_water_mark


class Clock:
    """Seconds by phase. On CUDA each phase waits for the device at both ends, so it holds its own work."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._spent = dict.fromkeys(("total", "forward", "backward", "update", "excluded"), 0.0)
        self._num_open = dict.fromkeys(self._spent, 0)
        self._opened = dict.fromkeys(self._spent, 0.0)

    def begin(self, phase: str) -> None:
        """Begin a phase. Blocks of one phase may overlap; the time that they share counts once."""
        if not self._num_open[phase]:
            self._opened[phase] = self._now()
        self._num_open[phase] += 1

    def end(self, phase: str) -> None:
        """End a phase."""
        self._num_open[phase] -= 1
        if not self._num_open[phase]:
            self._spent[phase] += self._now() - self._opened[phase]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block, or the function that this decorates, as a phase; "excluded" takes it out of the total."""
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def seconds(self) -> Seconds:
        """The seconds of the phases that have ended."""
        total, forward, backward, update, excluded = self._spent.values()
        return Seconds(forward, backward, update, max(total - excluded - forward - backward - update, 0.0))

    def _now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Seconds:
    """Training time by phase; `other` is the rest: splitting batches, zeroing gradients, the library's own work."""

    forward: float
    backward: float
    update: float
    other: float

    @property
    def total(self) -> float:
        """The sum of the phases."""
        return self.forward + self.backward + self.update + self.other


@dataclass(frozen=True)
class MeasuredMemory:
    """Peak memory of the training loop."""

    baseline_bytes: int  # just before it, with model, optimizer and data in place
    peak_bytes: int
    measured_by: str  # "CUDA allocator" or "process high-water mark"

    @property
    def rise_bytes(self) -> int:
        """What training added to the baseline."""
        return self.peak_bytes - self.baseline_bytes


def watch_memory(device: torch.device) -> Callable[[], MeasuredMemory]:
    """Watch peak memory from now to the call: of torch's allocator on CUDA, else the high-water mark of the process."""
    if device.type == "cuda":
        by, peak_bytes = "CUDA allocator", partial(torch.cuda.max_memory_allocated, device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        by, peak_bytes = "process high-water mark", partial(high_water_mark_bytes)
        reset_high_water_mark()
    baseline_bytes = peak_bytes()
    # Linux counts in batches, so the mark may read a little less than before.
    return lambda: MeasuredMemory(baseline_bytes, max(peak_bytes(), baseline_bytes), by)
