"""What an arm costs: seconds by phase and peak memory, measured inside its process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gradfold.memory.system import high_water_mark_bytes, reset_high_water_mark

__all__: list[str] = []

PHASES = ("forward", "backward", "update")


class Clock:
    """Seconds by phase. On CUDA each phase waits for the device at both ends, so that it holds its own work."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spent = dict.fromkeys((*PHASES, "excluded"), 0.0)
        self._num_open = dict.fromkeys(self._spent, 0)
        self._opened = dict.fromkeys(self._spent, 0.0)
        self._since = 0.0
        self._update_since = 0.0
        self.total_s = 0.0

    def start(self) -> None:
        """Start, or go on."""
        self._since = self._now()

    def stop(self) -> None:
        """Add the time since `start` to the total."""
        self.total_s += self._now() - self._since

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block as part of a phase; "excluded" takes it out of the total.

        Blocks of one phase may overlap, as forward passes in lock-step do: what they have in common counts once.
        """
        if not self._num_open[name]:
            self._opened[name] = self._now()
        self._num_open[name] += 1
        try:
            yield
        finally:
            self._num_open[name] -= 1
            if not self._num_open[name]:
                self._spent[name] += self._now() - self._opened[name]

    def begin_update(self) -> None:
        """The optimizer starts to step."""
        self._update_since = self._now()

    def end_update(self) -> None:
        """The optimizer has stepped."""
        self._spent["update"] += self._now() - self._update_since

    def seconds(self) -> Seconds:
        """What was spent so far."""
        total = self.total_s - self._spent["excluded"]
        forward, backward, update = (self._spent[name] for name in PHASES)
        return Seconds(forward, backward, update, max(total - forward - backward - update, 0.0))

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


@dataclass(frozen=True)
class Seconds:
    """Training time by phase; `other` is what is left: cutting batches, zeroing gradients, the library's own work."""

    forward: float
    backward: float
    update: float
    other: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.forward + self.backward + self.update + self.other

    def to_json(self) -> dict[str, Any]:
        """As plain numbers."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class MeasuredMemory:
    """Peak memory of the training loop.

    Args:
        baseline_bytes: in use just before it, with model, optimizer and data in place.
        peak_bytes: the most that was in use during it.
        measured_by: what was measured.
    """

    baseline_bytes: int
    peak_bytes: int
    measured_by: str

    @property
    def rise_bytes(self) -> int:
        """What training added to the baseline."""
        return max(self.peak_bytes - self.baseline_bytes, 0)

    def to_json(self) -> dict[str, Any]:
        """As plain numbers."""
        return {**asdict(self), "rise_bytes": self.rise_bytes}


class MemoryMeter:
    """Reads peak memory from its making on: torch's allocator on CUDA, else the high-water mark of the process."""

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
