"""A search for the fastest size: sizes timed in turn, compared within a round, the slow ones pruned on the way.

Machines are shared and their speed drifts: two sizes timed seconds apart differ by more than their speeds. Within a
round the drift is the same for all: the ratio of two paces of one round says more than that of two averages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from gradfold.errors import is_out_of_memory
from gradfold.memory.auto import SizeTiming

GOOD_ENOUGH = 0.97  # of the best pace, for a smaller size to be taken
_SLOW_BELOW = 0.4  # of it, after the warm-up, for a smaller size to be timed; a busy machine flatters small sizes
_SLOW_ABOVE = 0.15  # of it, for a larger size
_WARM_UPS = 3  # of which the best counts: what disturbs a machine makes nothing faster
_THRESHOLDS = (0.75, 0.85, 0.9, 0.93, 0.95)  # of the best pace, below which a size is pruned after each stage
_ROUNDS_PER_STAGE = 4
_MAX_ROUNDS = 40
_SHORTEST_S = 0.02  # what is timed at least, for the clock and the scheduler


class Search:
    """Times sizes, given in ascending order, until one stands out or `seconds` are over on the clock.

    Attributes:
        sizes: those that fit: on out-of-memory a size is dropped, with all above it.
    """

    def __init__(
        self,
        step: Callable[[int], None],  # runs one micro-step of so many rows, to its end
        sizes: Sequence[int],
        seconds: float,
        clock: Callable[[], float],
        stopwatch: Callable[[], float],  # for steps
    ) -> None:
        self._step, self._clock, self._stopwatch = step, clock, stopwatch
        self._seconds, self._end = seconds, clock() + seconds
        self._order = random.Random(0)  # not the user's
        self.sizes = list(sizes)
        self._rounds: list[dict[int, float]] = []  # samples per second by size, of each round

    def run(self) -> tuple[SizeTiming, ...]:
        """The timings, by size.

        Raises:
            Exception: what the model raises where it takes none of the sizes, or not even the smallest fits.
        """
        first = self._warm_up()
        best = max(first.values())
        reference = max(first, key=first.__getitem__)  # stays to the end: all are compared with it
        slow = {size: _SLOW_BELOW if size < reference else _SLOW_ABOVE for size in first}
        rows = round(best * _SHORTEST_S)  # that each size runs at least, in as many steps as that takes
        repeats = {size: max(-(-rows // size), 1) for size in first if first[size] >= slow[size] * best}
        thresholds = iter(_THRESHOLDS)
        while len(repeats) > 1 and len(self._rounds) < _MAX_ROUNDS and (self._clock() < self._end or not self._rounds):
            order = list(repeats)
            self._order.shuffle(order)
            self._rounds.append({size: self._pace(size, repeats[size]) for size in order})
            if len(self._rounds) % _ROUNDS_PER_STAGE == 0:
                ratios = self._ratios(repeats, reference)
                bound = next(thresholds, _THRESHOLDS[-1]) * max(ratios.values())
                repeats = {size: num for size, num in repeats.items() if ratios[size] >= bound or size == reference}
        return self._timings(first, reference)

    def _warm_up(self) -> dict[int, float]:
        """A first pace of each size, from small to large, up to where two in a row are slow."""
        paces: dict[int, float] = {}
        num_slow = 0
        refusal: Exception | None = None
        for size in tuple(self.sizes):
            try:
                paces[size] = self._first_pace(size)
            except Exception as error:
                if is_out_of_memory(error):
                    if not paces:
                        raise
                    self.sizes = list(paces)
                    break
                refusal = error  # a model may refuse one size: BatchNorm a single row
                self.sizes.remove(size)
                continue
            num_slow = num_slow + 1 if paces[size] < _SLOW_ABOVE * max(paces.values()) else 0
            if num_slow > 1 or self._clock() > self._end - 0.4 * self._seconds:
                break
        if not paces:
            assert refusal is not None
            raise refusal
        return paces

    def _first_pace(self, size: int) -> float:
        self._step(size)  # the first of a size allocates, and chooses kernels
        pace = self._pace(size, 1)
        for _ in range(_WARM_UPS - 1):
            if size < 0.02 * self._seconds * pace:  # it takes less than a fiftieth of the time
                pace = max(pace, self._pace(size, 1))
        return pace

    def _pace(self, size: int, num_steps: int) -> float:
        """Samples per second."""
        start = self._stopwatch()
        for _ in range(num_steps):
            self._step(size)
        return size * num_steps / max(self._stopwatch() - start, 1e-9)

    def _ratios(self, sizes: Iterable[int], reference: int) -> dict[int, float]:
        """Of the paces of some sizes to that of the reference, medians over the rounds in which they ran."""
        return {
            size: median(paces[size] / paces[reference] for paces in self._rounds if size in paces) for size in sizes
        }

    def _timings(self, first: dict[int, float], reference: int) -> tuple[SizeTiming, ...]:
        if not self._rounds:  # one size, or none that could keep up with it
            self._rounds.append({reference: first[reference]})
        ratios = self._ratios(self._rounds[0], reference)
        best = max(ratios.values())
        found = []
        for size, pace in first.items():
            paces = [of_round[size] for of_round in self._rounds if size in of_round]
            ratio = ratios[size] if paces else pace / first[reference]
            found.append(SizeTiming(size, median(paces or [pace]), ratio / best, len(paces)))
        return tuple(found)


def choose(timings: Sequence[SizeTiming]) -> SizeTiming:
    """The smallest size within 3 % of the best pace, of those that stayed to the end."""
    most = max(timing.num_rounds for timing in timings)
    stayed = [timing for timing in timings if timing.num_rounds == most]
    best = max(timing.ratio for timing in stayed)
    good = [timing for timing in stayed if timing.ratio >= GOOD_ENOUGH * best]
    return min(good, key=lambda timing: timing.micro_batch_size)
