"""What an arm costs: seconds by phase and peak memory, measured inside its process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
        """Time a block as part of a phase; "excluded" takes it out of the total."""
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
        return max(self.peak_bytes - self.baseline_bytes, 0)


class MemoryMeter:
    """Peak memory since its construction: of torch's allocator on CUDA, else the high-water mark of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            reset_high_water_mark()
        self._baseline_bytes = self._peak_bytes()

    def read(self) -> MeasuredMemory:
        """The memory up to now."""
        by = "CUDA allocator" if self._device.type == "cuda" else "process high-water mark"
        return MeasuredMemory(self._baseline_bytes, self._peak_bytes(), by)

    def _peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return high_water_mark_bytes()
