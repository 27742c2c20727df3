"""The auto-tuner: picks the micro-batch size of an accumulator, with no side effect on model, gradients and RNG.

What fits is predicted, what is fastest is timed. It runs inside a window that has set gradients aside.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle

import torch

from gradfold.batch.nesting import Batch, map_tensors
from gradfold.distributed.process_group import TuningGroup
from gradfold.engine.backward import BackPropagation
from gradfold.engine.model_checks import refuse_lazy
from gradfold.engine.recovery import release_memory
from gradfold.errors import DoesNotFitError, ModelError
from gradfold.memory import cache
from gradfold.memory.auto import Auto, MicroBatchChoice
from gradfold.memory.budget import Budget, tuning_budget, written
from gradfold.memory.dry_run import DryRun, watching
from gradfold.memory.estimate import PeakEstimate
from gradfold.memory.search import GOOD_ENOUGH, Search, choose
from gradfold.self_check.probe_run import ProbeRun
from gradfold.self_check.rng_replay import CustomGenerators
from gradfold.state.external import ExternalState

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

    def tune(self, dry_run: DryRun, back_propagate: BackPropagation, group: TuningGroup) -> MicroBatchChoice:
        """Find the size for the batch of a dry run, together with the processes of a group.

        Raises:
            DoesNotFitError: not even one row fits.
            ModelError: it has lazy layers that have not run.
            Exception: whatever the model raises on one row.
        """
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
                    cache.write(key, choice, breakdown, budget)
        self.choice = choice
        return choice

    def _prepare(self, dry_run: DryRun, num_processes: int) -> tuple[str, Budget, MicroBatchChoice | None]:
        """What a choice depends on, and the cached one, if it still holds."""
        option = self._option
        key = cache.key_of(dry_run, option, num_processes)
        budget = tuning_budget(option.memory, option.margin, dry_run.model)
        return key, budget, cache.read(key, budget) if option.cache else None

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
        if search.sizes[-1] < largest:  # out of memory
            largest = search.sizes[-1]
            release_memory(device)
        size = choose(timings).micro_batch_size
        fastest = max(timings, key=lambda timing: timing.ratio if timing.num_rounds else 0.0).micro_batch_size
        reason = _reason(size, fastest, largest, num_rows)
        return MicroBatchChoice(size, reason, timings, num_rows, largest, peak_bytes=0, elapsed_s=0.0)


class _TimedSteps:
    """Micro-steps of any size, whose batches are taken and moved before they are timed.

    Attributes:
        own_generators: the user's, as the first step of each size has shown them.
    """

    def __init__(self, probe_run: ProbeRun, dry_run: DryRun, device: torch.device) -> None:
        self._probe_run = probe_run
        self._model, self._probe_batch, self._device = dry_run.model, dry_run.probe_batch, device
        self.own_generators = CustomGenerators()
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


def _largest(dry_run: DryRun, budget: Budget) -> tuple[int, PeakEstimate | None]:
    """The largest size that fits, and the estimate; all rows of the batch where nothing can be predicted."""
    try:
        estimate = PeakEstimate(dry_run, next(dry_run.model.parameters()).device)
    except ModelError:  # on out-of-memory the search drops a size
        return dry_run.probe_batch.num_rows, None
    size = dry_run.probe_batch.num_rows if budget.num_bytes is None else estimate.solve(budget.has_room_for)
    if size is None:
        raise DoesNotFitError(
            f"not even one row fits into {written(budget.num_bytes or 0)}: it takes {written(estimate.peak(1).total)} "
            "at its peak, before a margin and the optimizer's state. gradfold.plan(...) shows what would reduce it; "
            "micro_batch_size=1 tries it all the same.",
            (1,),
        )
    return size, estimate


def _reason(size: int, fastest: int, largest: int, num_rows: int) -> str:
    bound = "all rows of the batch" if largest == num_rows else "what fits into memory"
    if size == largest:
        return f"the fastest, and the largest: {bound}"
    if size == fastest:
        return f"the fastest of those up to {largest} ({bound})"
    within = f"within {100 * (1 - GOOD_ENOUGH):.0f} % of the pace of the fastest ({fastest})"
    return f"the smallest {within}, of those up to {largest} ({bound})"
