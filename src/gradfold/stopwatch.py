"""A stopwatch: what a micro-step costs beside its tokens, from micro-batches of which some are as small as can be."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch

from gradfold.backward import Weighed
from gradfold.split import MicroBatch
from gradfold.window import Backward, Forward, Schedule

__all__: list[str] = []


class Stopwatch:
    """Goes around a schedule: how long each micro-batch takes, forward and backward."""

    def __init__(self, schedule: Schedule, micro_batches: Sequence[MicroBatch], device: torch.device) -> None:
        self._schedule = schedule
        self._sizes = [part.size for part in micro_batches]
        self._is_probe = [len(part.rows) == 1 for part in micro_batches]
        self._device = device
        self._elapsed_s: dict[int, float] = {}

    def __call__(self, indices: Sequence[int], forward: Forward, backward: Backward) -> None:
        """Run the micro-batches as the schedule does."""
        begun: list[tuple[int, float]] = []

        def timed_forward(index: int) -> Weighed:
            begun.append((index, self._now()))
            return forward(index)

        def timed_backward(weighed: Weighed) -> None:
            backward(weighed)
            index, start = begun[-1]
            self._elapsed_s[index] = self._now() - start

        self._schedule(indices, timed_forward, timed_backward)

    def overhead(self) -> float | None:
        """What a micro-step costs beside its tokens, in tokens; None where these micro-batches do not tell.

        A line through those of one row and the larger ones, each at their medians. A power of two, since the cut is to
        change little with the noise of a clock: near the best cut its cost hardly depends on it.
        """
        largest = max(self._sizes)
        small = [index for index in self._elapsed_s if self._is_probe[index] and self._sizes[index] <= largest / 4]
        large = [index for index in self._elapsed_s if self._sizes[index] > largest / 2]
        if not small or not large:
            return None
        (few, short), (many, long) = (
            (
                statistics.median(self._sizes[index] for index in indices),
                statistics.median(self._elapsed_s[index] for index in indices),
            )
            for indices in (small, large)
        )
        rate = (long - short) / (many - few)
        tokens = largest if rate <= 0 else min(max(short / rate - few, 1.0), largest)
        return float(2 ** round(math.log2(tokens)))

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()
