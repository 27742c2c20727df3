"""A search for the fastest size: sizes timed in turn, compared within a round, the slow ones dropped on the way.

Machines are shared and their speed drifts: two sizes timed seconds apart differ by more than what is to be seen. Within
a round the drift is the same for all, so that the ratio of two paces of one round says more than that of two averages.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from gradfold.errors import is_out_of_memory
from gradfold.memory.auto import SizeTiming

__all__: list[str] = []

Step = Callable[[int], None]
"""Runs one micro-step of so many rows, to its end."""

GOOD_ENOUGH = 0.97  # of the best pace, for a smaller size to be taken
_HOPELESS = (
    0.4  # of it, after a look, for a size below the best; on a busy machine small ones look better than they are
)
_HOPELESS_ABOVE = 0.15
_LOOKS = 3  # of which the best counts: what disturbs a machine makes nothing faster
_DROPS = (0.75, 0.85, 0.9, 0.93, 0.95)  # what is slower after each stage drops out
_ROUNDS_PER_STAGE = 4
_MAX_ROUNDS = 40
_SHORTEST_S = 0.02  # what is timed at least, for the clock and the scheduler


class Search:
    """Times sizes until one stands out or the time is up.

    Args:
        step: what is timed.
        sizes: ascending.
        seconds: for how long at most; what is begun is ended.
        clock: gives the seconds that pass.
        stopwatch: gives the seconds that a step takes; None: `clock`.

    Attributes:
        sizes: those that fit: a size for which memory runs out is dropped, with all above it.
    """

    def __init__(
        self,
        step: Step,
        sizes: Sequence[int],
        seconds: float,
        clock: Callable[[], float] = time.perf_counter,
        stopwatch: Callable[[], float] | None = None,
    ) -> None:
        self._stopwatch = stopwatch or clock
        self._step = step
        self._clock = clock
        self._end = clock() + seconds
        self._seconds = seconds
        self._order = random.Random(0)  # none of the user's
        self.sizes = list(sizes)
        self._rounds: list[dict[int, float]] = []  # samples per second by size, of each round

    def run(self) -> tuple[SizeTiming, ...]:
        """What was timed, by size.

        Raises:
            Exception: what the model raises where it takes none of the sizes, or not even the smallest fits.
        """
        looks = self._look()
        best = max(looks.values())
        reference = max(looks, key=lambda size: looks[size])  # races to the end, as what all are compared with
        hopeless = {size: _HOPELESS if size < reference else _HOPELESS_ABOVE for size in looks}
        rows = round(best * _SHORTEST_S)  # that each size runs at least, in as many steps as that takes
        repeats = {size: max(-(-rows // size), 1) for size in looks if looks[size] >= hopeless[size] * best}
        drops = iter(_DROPS)
        while len(repeats) > 1 and len(self._rounds) < _MAX_ROUNDS and (self._clock() < self._end or not self._rounds):
            self._rounds.append(self._round(repeats))
            if len(self._rounds) % _ROUNDS_PER_STAGE == 0:
                ratios = self._ratios(repeats, reference)
                bound = next(drops, _DROPS[-1]) * max(ratios.values())
                repeats = {size: num for size, num in repeats.items() if ratios[size] >= bound or size == reference}
        return self._timings(looks, reference)

    def _look(self) -> dict[int, float]:
        """A look at each size, from small to large: the paces, up to where it gets hopeless twice in a row."""
        paces: dict[int, float] = {}
        num_hopeless = 0
        refusal: Exception | None = None
        for size in tuple(self.sizes):
            try:
                paces[size] = self._look_at(size)
            except Exception as error:
                if is_out_of_memory(error):
                    if not paces:
                        raise
                    self.sizes = list(paces)
                    break
                refusal = error  # a model may refuse one size: BatchNorm a single row
                self.sizes.remove(size)
                continue
            is_hopeless = paces[size] < _HOPELESS_ABOVE * max(paces.values())
            num_hopeless = num_hopeless + 1 if is_hopeless else 0
            if num_hopeless > 1 or self._clock() > self._end - 0.4 * self._seconds:
                break
        if not paces:
            assert refusal is not None
            raise refusal
        return paces

    def _look_at(self, size: int) -> float:
        self._step(size)  # the first of a size allocates, and chooses kernels
        pace = self._pace(size, 1)
        for _ in range(_LOOKS - 1):
            if size < 0.02 * self._seconds * pace:  # it takes less than a fiftieth of the time
                pace = max(pace, self._pace(size, 1))
        return pace

    def _round(self, repeats: dict[int, int]) -> dict[int, float]:
        order = list(repeats)
        self._order.shuffle(order)
        return {size: self._pace(size, repeats[size]) for size in order}

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

    def _timings(self, looks: dict[int, float], reference: int) -> tuple[SizeTiming, ...]:
        if not self._rounds:  # one size, or none that could keep up with it
            self._rounds.append({reference: looks[reference]})
        raced = self._ratios(self._rounds[0], reference)
        best = max(raced.values())
        found = []
        for size, look in looks.items():
            paces = [of_round[size] for of_round in self._rounds if size in of_round]
            if paces:
                found.append(SizeTiming(size, median(paces), raced[size] / best, len(paces)))
            else:
                found.append(SizeTiming(size, look, look / looks[reference] / best, 0))
        return tuple(found)


def choose(timings: Sequence[SizeTiming]) -> SizeTiming:
    """The smallest size within 3 % of the best pace, of those that raced to the end."""
    most = max(timing.num_rounds for timing in timings)
    racing = [timing for timing in timings if timing.num_rounds == most]
    best = max(timing.ratio for timing in racing)
    return min(
        (timing for timing in racing if timing.ratio >= GOOD_ENOUGH * best),
        key=lambda timing: timing.micro_batch_size,
    )
