"""A stopwatch: how long the script trains after its first step, without the doctor's own work."""

from __future__ import annotations

import time

__all__: list[str] = []


class Stopwatch:
    """Stands still until the first step.

    Attributes:
        since: number of the first event after that step; 0 before it.
    """

    def __init__(self) -> None:
        self.since = 0
        self._start_s: float | None = None
        self._cost_s = 0.0

    def start(self, since: int) -> None:
        """The first step was made; later ones change nothing."""
        if self._start_s is None:
            self.since, self._start_s, self._cost_s = since, time.perf_counter(), 0.0

    def take_off(self, seconds: float) -> None:
        """Of the doctor's own work."""
        self._cost_s += seconds

    def read(self) -> float:
        """Seconds so far."""
        return 0.0 if self._start_s is None else time.perf_counter() - self._start_s - self._cost_s
