"""The auto-tuner: picks the micro-batch size of an accumulator, with no side effect on model, gradients and RNG.

What fits is predicted, what is fastest is timed. It runs inside a window that has set gradients aside. Machines are
shared and their speed drifts, so sizes are timed in turn, and compared by the ratio of their paces in one round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from statistics import median

import torch

from gradfold.batch.nesting import Batch, map_tensors
from gradfold.distributed.process_group import TuningGroup
from gradfold.engine.backward import BackPropagation
from gradfold.engine.model_checks import refuse_lazy
from gradfold.engine.recovery import release_memory
from gradfold.errors import DoesNotFitError, ModelError, is_out_of_memory
from gradfold.memory.auto import Auto, MicroBatchChoice, SizeTiming, cache_key, read_cached, write_cached
from gradfold.memory.budget import Budget, tuning_budget, written
from gradfold.memory.dry_run import DryRun, watching
from gradfold.memory.estimate import PeakEstimate
from gradfold.messages import join_names
from gradfold.self_check.probe_run import ProbeRun
from gradfold.self_check.rng_replay import CustomGenerators
from gradfold.state.external import ExternalState

_GOOD_ENOUGH = 0.97  # of the best pace, for a smaller size to be taken
_SLOW_BELOW = 0.4  # of it, after the warm-up, for a smaller size to be timed; a busy machine flatters small sizes
_SLOW_ABOVE = 0.15  # of it, for a larger size
_WARM_UPS = 3  # of which the best counts: what disturbs a machine makes nothing faster
_THRESHOLDS = (0.75, 0.85, 0.9, 0.93, 0.95)  # of the best pace, below which a size is pruned after each stage
_ROUNDS_PER_STAGE = 4
_MAX_ROUNDS = 40
_SHORTEST_S = 0.02  # what is timed at least, for the clock and the scheduler
_ENOUGH_ROWS = 64
_MAX_BATCHES = 8  # of one size, which stay on the device while sizes are timed


class AutoTuner:
    """Chooses once, and again where a batch has twice the rows of one that was too small to choose from."""

    def __init__(self, option: Auto) -> None:
        self._option = option
        self.choice: MicroBatchChoice | None = None  # the last one

    def is_due(self, num_rows: int) -> bool:
        """Whether a batch of so many rows asks for a choice."""
        choice = self.choice
        return choice is None or (choice.is_bound_by_rows and num_rows >= 2 * choice.num_rows)

    def tune(self, dry_run: DryRun, back_propagate: BackPropagation, group: TuningGroup) -> MicroBatchChoice:
        """Find the size for the batch of a dry run, together with the processes of a group."""
        since = time.perf_counter()
        refuse_lazy(dry_run.model, 'micro_batch_size="auto"')
        with ExternalState(dry_run.model, dry_run.loss_fn, dry_run.probe_batch.collate):
            key, budget, choice = group.attempt(lambda: self._prepare(dry_run, group.size))
            of_all = group.gather(None if choice is None else choice.micro_batch_size)
            if choice is None or len(set(of_all)) > 1:
                largest, estimate = group.attempt(lambda: _largest(dry_run, budget))
                choice = self._search(dry_run, min(group.gather(largest)), back_propagate, group)
                breakdown = None if estimate is None else estimate.peak(choice.micro_batch_size)
                peak_bytes = 0 if breakdown is None else breakdown.total
                choice = replace(choice, peak_bytes=peak_bytes, elapsed_s=time.perf_counter() - since)
                if self._option.cache:
                    write_cached(key, choice, breakdown, budget)
        self.choice = choice
        return choice

    def _prepare(self, dry_run: DryRun, num_processes: int) -> tuple[str, Budget, MicroBatchChoice | None]:
        """What a choice depends on, and the cached one, if it still holds."""
        option = self._option
        key = cache_key(dry_run, option, num_processes)
        budget = tuning_budget(option.memory, option.margin, dry_run.model)
        return key, budget, read_cached(key, budget) if option.cache else None

    def _search(
        self, dry_run: DryRun, largest: int, back_propagate: BackPropagation, group: TuningGroup
    ) -> MicroBatchChoice:
        """Time powers of two, and the largest size."""
        model, num_rows = dry_run.model, dry_run.probe_batch.num_rows
        device = next(model.parameters()).device
        sizes = [*(2**power for power in range(largest.bit_length()) if 2**power < largest), largest]
        with ProbeRun(model, dry_run.precision.around(dry_run.loss_fn), back_propagate) as probe_run:
            steps = _TimedSteps(probe_run, dry_run, device)
            search = Search(steps.run, sizes, self._option.seconds, group.clock, group.stopwatch(device))
            try:
                timings = search.run()
            finally:
                steps.own_generators.restore_generators()
        bound = "the most that fits into memory"
        if search.sizes[-1] < largest:  # out of memory, or the model takes no more
            largest = search.sizes[-1]
            bound = bound if search.is_out_of_memory else "the most that the model takes"
            release_memory(device)
        if largest == num_rows:
            bound = "all rows of the batch"
        size = choose(timings).micro_batch_size
        fastest = max(timings, key=lambda timing: timing.ratio).micro_batch_size
        reason = _reason(size, fastest, [timing.micro_batch_size for timing in timings], largest, bound)
        return MicroBatchChoice(size, reason, timings, num_rows, largest, peak_bytes=0, elapsed_s=0.0)


class _TimedSteps:
    """Micro-steps of any size, whose batches are taken and moved before they are timed."""

    def __init__(self, probe_run: ProbeRun, dry_run: DryRun, device: torch.device) -> None:
        self._probe_run = probe_run
        self._model, self._probe_batch, self._device = dry_run.model, dry_run.probe_batch, device
        self.own_generators = CustomGenerators()  # as the first step of each size has shown them
        self._batches: dict[int, Iterator[Batch]] = {}
        self._size = 0  # of the last step
        self._num_left = 0  # of its window

    def run(self, size: int) -> None:
        """One forward and backward pass; it waits for the device."""
        weight = size / self._probe_batch.num_rows
        if size not in self._batches:
            batches = self._take(size)
            self._batches[size] = cycle(batches)
            self._probe_run.drop_gradient()
            # With care: this also finds tensors outside the model that it trains, generators that it draws from, and
            # inputs that it changes.
            self._probe_run.run(batches[0], lambda name: weight, watching(self.own_generators, self._model))
        if size != self._size or not self._num_left:
            # As in a window, whose first micro-batch finds no gradient to add to: a batch at once is spared all adding.
            self._probe_run.drop_gradient()
            self._size, self._num_left = size, -(-self._probe_batch.num_rows // size)
        self._num_left -= 1
        self._probe_run.step(next(self._batches[size]), lambda name: weight)
        if self._device.type not in ("cpu", "meta"):
            torch.get_device_module(self._device).synchronize()

    def _take(self, size: int) -> list[Batch]:
        """Micro-batches on the device: of small ones several, since samples may differ in length."""
        num = max(min(_ENOUGH_ROWS // size, _MAX_BATCHES, self._probe_batch.num_rows // size), 1)
        taken = [self._probe_batch.take_unchanged(size, start) for start in range(0, num * size, size)]
        return [map_tensors(lambda tensor: tensor.to(self._device), batch) for batch in taken]


class Search:
    """Times sizes, given in ascending order, until one stands out or `seconds` are over on the clock."""

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
        self.sizes = list(sizes)  # on out-of-memory one is dropped, with all above it
        self.is_out_of_memory = False

    def run(self) -> tuple[SizeTiming, ...]:
        """The timings, by size. An error of the model comes out where it takes none, or the smallest does not fit."""
        first = self._warm_up()
        best = max(first.values())
        reference = max(first, key=first.__getitem__)  # stays to the end: all are compared with it
        slow = {size: _SLOW_BELOW if size < reference else _SLOW_ABOVE for size in first}
        rows = round(best * _SHORTEST_S)  # that each size runs at least, in as many steps as that takes
        repeats = {size: max(-(-rows // size), 1) for size in first if first[size] >= slow[size] * best}
        thresholds = iter(_THRESHOLDS)
        paces: dict[int, list[float]] = {size: [] for size in first}  # of each round, up to where a size is pruned
        rounds = paces[reference]
        while len(repeats) > 1 and len(rounds) < _MAX_ROUNDS and (self._clock() < self._end or not rounds):
            order = list(repeats)
            self._order.shuffle(order)
            for size in order:
                paces[size].append(self._pace(size, repeats[size]))
            if len(rounds) % _ROUNDS_PER_STAGE == 0:
                ratios = {size: _median_ratio(paces[size], rounds) for size in repeats}
                bound = next(thresholds, _THRESHOLDS[-1]) * max(ratios.values())
                repeats = {size: num for size, num in repeats.items() if ratios[size] >= bound or size == reference}
        if not rounds:  # one size, or none that could keep up with it
            rounds.append(best)
        ratios = {size: _median_ratio(own, rounds) if own else first[size] / best for size, own in paces.items()}
        fastest = max(ratios.values())
        return tuple(
            SizeTiming(size, median(own or [first[size]]), ratios[size] / fastest, len(own))
            for size, own in paces.items()
        )

    def _warm_up(self) -> dict[int, float]:
        """A first pace of each size, from small to large, up to where two in a row are slow."""
        paces: dict[int, float] = {}
        num_slow = 0
        refusals: list[Exception] = []
        for size in tuple(self.sizes):
            try:
                paces[size] = self._first_pace(size)
            except Exception as error:
                if is_out_of_memory(error):
                    if not paces:
                        raise
                    self.sizes, self.is_out_of_memory = list(paces), True
                    break
                refusals.append(error)  # a model may refuse one size: BatchNorm a single row
                self.sizes.remove(size)
                continue
            num_slow = num_slow + 1 if paces[size] < _SLOW_ABOVE * max(paces.values()) else 0
            if num_slow > 1 or self._clock() > self._end - 0.4 * self._seconds:
                break
        if not paces:
            raise refusals[-1]
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


def _median_ratio(paces: Iterable[float], reference: Iterable[float]) -> float:
    """Of paces to those of the reference in the same rounds, of which there may be more."""
    return median(own / other for own, other in zip(paces, reference, strict=False))


def choose(timings: Sequence[SizeTiming]) -> SizeTiming:
    """The smallest size within 3 % of the best pace, of those that stayed to the end; timings are by size."""
    most = max(timing.num_rounds for timing in timings)
    stayed = [timing for timing in timings if timing.num_rounds == most]
    best = max(timing.ratio for timing in stayed)
    return next(timing for timing in stayed if timing.ratio >= _GOOD_ENOUGH * best)


def _largest(dry_run: DryRun, budget: Budget) -> tuple[int, PeakEstimate | None]:
    """The largest size that fits, and the estimate; without one, the largest that might."""
    num_rows = dry_run.probe_batch.num_rows
    try:
        estimate = PeakEstimate(dry_run, next(dry_run.model.parameters()).device)
        size = num_rows if budget.num_bytes is None else estimate.solve(budget.has_room_for)
    except ModelError:
        if not budget.is_on_top:  # the user's own, which could not be kept
            raise
        # On out-of-memory the search drops a size. What is coupled takes no less than what is not.
        return (_largest(replace(dry_run, coupling=""), budget)[0] if dry_run.coupling else num_rows), None
    if size is None:
        raise DoesNotFitError(
            f"not even one row fits into {written(budget.num_bytes or 0)}: it takes {written(estimate.peak(1).total)} "
            "at its peak, before a margin and the optimizer's state. gradfold.plan(...) shows what would reduce it; "
            "micro_batch_size=1 tries it all the same.",
            (1,),
        )
    return size, estimate


def _reason(size: int, fastest: int, timed: Sequence[int], largest: int, bound: str) -> str:
    if size == largest:
        return f"the fastest, and the largest: {bound}"
    what = "the fastest"
    if size != fastest:
        what = f"the smallest within {100 * (1 - _GOOD_ENOUGH):.0f} % of the pace of the fastest ({fastest})"
    rest = f"{largest} is {bound}" + (", and was not timed" if largest not in timed else "")
    return f"{what} of {join_names([str(one) for one in timed], len(timed))}, which were timed; {rest}"
