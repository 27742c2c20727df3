"""A sizer: finds the micro-batch size of an accumulator, without a trace in model, gradients and random numbers.

What fits is predicted, what is fastest is timed. It is asked from inside a window that has set gradients aside.

A work: what is to be sized, as an accumulator hands it over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle

import torch

from gradfold.batch.nesting import Batch, map_tensors
from gradfold.engine.model_checks import refuse_lazy
from gradfold.engine.recovery import give_back
from gradfold.errors import DoesNotFitError, ModelError
from gradfold.memory import cache
from gradfold.memory.amount import written
from gradfold.memory.auto import Auto, MicroBatchChoice
from gradfold.memory.budget import Budget
from gradfold.memory.cache import CachedChoice, key_of
from gradfold.memory.dry_run import Rehearsal, seen_by
from gradfold.memory.estimate import PeakEstimate, largest_that_fits
from gradfold.memory.probe_batch import Work
from gradfold.memory.search import GOOD_ENOUGH, Search, choose
from gradfold.memory.trace import MemoryBreakdown
from gradfold.self_check.rng_replay import OwnGenerators
from gradfold.self_check.trial import Trial
from gradfold.state.external import ExternalState

__all__: list[str] = []


_ENOUGH_ROWS = 64
_MAX_BATCHES = 8  # of one size, which stay on the device while sizes are timed


class AutoTuner:
    """Chooses once, and again where a batch has twice the rows of one that was too small to choose from.

    Attributes:
        choice: the last one; None before the first batch.
    """

    def __init__(self, option: Auto) -> None:
        self._option = option
        self.choice: MicroBatchChoice | None = None

    def is_due(self, num_rows: int) -> bool:
        """Whether a batch of so many rows asks for a choice."""
        choice = self.choice
        return choice is None or (choice.is_bound_by_rows and num_rows >= 2 * choice.num_rows)

    def choose(self, work: Work) -> MicroBatchChoice:
        """Find the size for a batch.

        Raises:
            DoesNotFitError: not even one row fits.
            ModelError: it has lazy layers that have not run.
            Exception: whatever the model raises on one row.
        """
        refuse_lazy(work.model, 'micro_batch_size="auto"')
        with ExternalState(work.model, work.loss_fn, work.specimen.collate):
            return self._choose(work)

    def _choose(self, work: Work) -> MicroBatchChoice:
        since = time.perf_counter()
        company = work.company
        key, budget, remembered = company.attempt(lambda: self._prepare(work))
        of_all = company.gather(None if remembered is None else remembered.micro_batch_size)
        self.choice = remembered if len(set(of_all)) == 1 else None
        if self.choice is None:
            largest, make_up_of = company.attempt(lambda: self._largest(work, budget))
            found = self._search(work, min(company.gather(largest)))
            make_up = None if make_up_of is None else make_up_of(found.micro_batch_size)
            peak_bytes = 0 if make_up is None else make_up.total
            self.choice = replace(found, peak_bytes=peak_bytes, elapsed_s=time.perf_counter() - since)
            if self._option.cache:
                cache.write(key, CachedChoice(self.choice, make_up, budget.num_bytes).to_json())
        return self.choice

    def _prepare(self, work: Work) -> tuple[str, Budget, MicroBatchChoice | None]:
        """What a choice depends on, and what an earlier start has chosen."""
        key, budget = key_of(work, self._option), Budget(self._option, work)
        return key, budget, self._remembered(key, budget)

    def _remembered(self, key: str, budget: Budget) -> MicroBatchChoice | None:
        """What an earlier start has chosen, if that is as good as ever."""
        found = cache.read(key) if self._option.cache else None
        memo = None if found is None else CachedChoice.from_json(found)
        return replace(memo.choice, is_cached=True) if memo is not None and memo.holds_under(budget) else None

    def _largest(self, work: Work, budget: Budget) -> tuple[int, Callable[[int], MemoryBreakdown] | None]:
        """The largest size that fits, and what gives the memory of each; all of the batch where nobody can tell."""
        num_rows = work.specimen.num_rows
        try:
            rehearsal = Rehearsal(
                *(work.model, work.loss_fn, work.specimen, None, work.precision), reduces_once=work.reduces_once
            )
            prediction = PeakEstimate(rehearsal, work.device)
        except ModelError:  # recovery stands behind what is tried
            return num_rows, None
        if budget.num_bytes is None:
            return num_rows, prediction.peak
        size = largest_that_fits(lambda size: budget.has_room_for(prediction.peak(size)), num_rows)
        if size is not None and not prediction.check(size):
            size = largest_that_fits(lambda size: budget.has_room_for(prediction.peak(size)), num_rows)
        if size is None:
            raise DoesNotFitError(
                f"not even one row fits into {written(budget.num_bytes)}: it takes {written(prediction.peak(1).total)} "
                "at its peak, before a margin and the optimizer's state. gradfold.plan(...) shows what would reduce "
                "it; micro_batch_size=1 tries it all the same.",
                (1,),
            )
        return size, prediction.peak

    def _search(self, work: Work, largest: int) -> MicroBatchChoice:
        num_rows, company = work.specimen.num_rows, work.company
        with Trial(work.model, work.precision.around(work.loss_fn), work.back_propagate) as trial:
            steps = _Steps(trial, work)
            stopwatch = company.stopwatch(work.device)
            search = Search(steps.run, _ladder(largest), self._option.seconds, company.clock, stopwatch)
            try:
                timings = search.run()
            finally:
                steps.own_generators.restore_generators()
        if search.sizes[-1] < largest:  # memory ran out
            give_back(work.device)
        chosen = choose(timings)
        fastest = max(timings, key=lambda timing: timing.ratio if timing.num_rounds else 0.0)
        return MicroBatchChoice(
            chosen.micro_batch_size,
            _reason(chosen.micro_batch_size, fastest.micro_batch_size, search.sizes[-1], num_rows),
            timings,
            num_rows,
            search.sizes[-1],
            peak_bytes=0,
            elapsed_s=0.0,
        )


class _Steps:
    """Micro-steps of any size, whose batches are cut and moved before they are timed.

    Attributes:
        own_generators: of the user's, that the first step of a size has shown.
    """

    def __init__(self, trial: Trial, work: Work) -> None:
        self._trial = trial
        self._work = work
        self.own_generators = OwnGenerators()
        self._batches: dict[int, Iterator[Batch]] = {}
        self._size = 0  # of the last step
        self._num_left = 0  # of its window

    def run(self, size: int) -> None:
        """One forward and backward pass; it waits for the device."""
        share = size / self._work.specimen.num_rows
        if size not in self._batches:
            batches = [self._take(size, start) for start in self._starts(size)]
            self._batches[size] = cycle(batches)
            self._trial.drop_gradient()
            # With care: this also finds tensors outside the model that it trains, generators that it draws from, and
            # inputs that it changes.
            self._trial.run(batches[0], lambda name: share, seen_by(self.own_generators, self._work.model))
        if size != self._size or not self._num_left:
            # As in a window, whose first micro-batch finds no gradient to add to: a batch at once is spared all adding.
            self._trial.drop_gradient()
            self._size, self._num_left = size, -(-self._work.specimen.num_rows // size)
        self._num_left -= 1
        self._trial.step(next(self._batches[size]), lambda name: share)
        if self._work.device.type not in ("cpu", "meta"):
            torch.get_device_module(self._work.device).synchronize()

    def _starts(self, size: int) -> range:
        """Where micro-batches begin: of small ones several, since samples may differ in length."""
        num = max(min(_ENOUGH_ROWS // size, _MAX_BATCHES, self._work.specimen.num_rows // size), 1)
        return range(0, num * size, size)

    def _take(self, size: int, start: int) -> Batch:
        taken = self._work.specimen.take_as_it_is(size, start)
        return map_tensors(lambda tensor: tensor.to(self._work.device), taken)


def _ladder(largest: int) -> list[int]:
    """The sizes to try: powers of two, and the largest."""
    powers = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return [*powers, largest]


def _reason(size: int, fastest: int, largest: int, num_rows: int) -> str:
    bound = "all rows of the batch" if largest == num_rows else "what fits into memory"
    if size == largest:
        return f"the fastest, and the largest: {bound}"
    if size == fastest:
        return f"the fastest of those up to {largest} ({bound})"
    return (
        f"the smallest within {100 * (1 - GOOD_ENOUGH):.0f} % of the pace of the fastest ({fastest}), of those up to "
        f"{largest} ({bound})"
    )
