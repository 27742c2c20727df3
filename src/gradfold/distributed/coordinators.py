"""An agreement: what the ranks tell each other in a window, so that none waits for one that has failed.

All of them meet four times, and nowhere else, since forward and backward passes reduce nothing:

    [A] denominators   begun before the first forward pass, read after it
    [B] end            every rank has run its micro-batches: loss sums, which parameters have gradients
    [C] gradients      summed, in as few reductions as buckets; nothing that can fail is left to do in between
    [D] conclusion     all are well: the gradient is handed over

A rank that fails goes to the next meeting all the same, says so, and raises its own error; the others raise
DistributedError
with its text. So an error on one rank ends the window on all, rolled back, and nobody hangs.

Shards: what ranks agree on where each holds a part of every parameter (fully_shard), and how they take turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, TypeAlias

from torch import Tensor

from gradfold.batch.nesting import Batch
from gradfold.batch.split import MicroBatch
from gradfold.distributed.process_group import ProcessGroup, Reduction
from gradfold.engine.coordinator import Coordinator, T, Weigh
from gradfold.engine.loss_terms import LossTerms, TermSums, read_pair, read_terms
from gradfold.engine.metrics import Metrics
from gradfold.engine.prefetch import prefetch
from gradfold.engine.window import Backward, Forward, Schedule, Window
from gradfold.errors import DistributedError
from gradfold.state.gradients import GradientBuffer
from gradfold.weights import WindowWeights

__all__: list[str] = []


@dataclass(frozen=True)
class _RankFailure:
    text: str


@dataclass(frozen=True)
class WindowReport:
    """What a rank tells the others at the end of its micro-batches."""

    losses: TermSums
    metrics: dict[str, tuple[float, float]]
    gradients: list[str | None]
    found: list[bool]


class DataParallelCoordinator(Coordinator):
    """Several processes.

    Args:
        ranks: these.
        weigh: weighs the micro-batches of this rank.
        num_totals: how many denominators that gives.

    Attributes:
        ranks: as given.
        num_busy: micro-batches that weigh something, by rank; known with the denominators.
        num_rows: rows, by rank; likewise.
        next: the meeting at which others would wait; None where there is none.
    """

    def __init__(self, ranks: ProcessGroup, weigh: Weigh, num_totals: int) -> None:
        super().__init__(self._weigh_together)
        self.ranks = ranks
        self._weigh_own = weigh
        self._num_totals = num_totals
        self._wait: Callable[[], list[list[float]]] | None = None  # for meeting [A], once it has begun
        self._totals: list[float] | None = None  # what it gave, summed
        self.num_busy: list[int] = []
        self.num_rows: list[int] = []
        self.next: Literal["denominators", "share", "conclusion"] | None = "denominators"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        meeting, self.next = self.next, None
        if error is None:
            return
        if meeting == "denominators" and self._wait is None:
            self.ranks.begin_gather([1.0, 0.0] + [0.0] * self._num_totals)()
        elif meeting == "conclusion":
            self.ranks.all_well(False)
        elif self._wait is not None and self._totals is None:
            self._wait()
        if meeting is not None:
            self.ranks.exchange(_RankFailure(f"{type(error).__name__}: {error}"))

    def end(self, losses: LossTerms, metrics: Metrics, gradients: GradientBuffer) -> None:
        """Meetings [B] and [C]."""
        self.read_totals()
        losses.settle()
        # Whatever takes memory comes before the meeting: after it the others wait.
        reduction, zeros = Reduction(self.ranks, gradients.parameters), gradients.zeros()
        reports = self.share(
            WindowReport(losses.own_sums(), metrics.sums(), gradients.layouts(), gradients.are_found())
        )
        losses.join([report.losses for report in reports])
        metrics.join([report.metrics for report in reports])
        _refuse_differences(reports)
        layouts = [_common(of_parameter) for of_parameter in zip(*[one.gradients for one in reports], strict=True)]
        reduction.run(gradients.in_layouts(layouts, zeros))
        self.next = "conclusion"

    def conclude(self) -> None:
        """Meeting [D]; DistributedError where another rank has failed since the end."""
        self.next = None
        if not self.ranks.all_well(True):
            self.share(None)  # raises

    def reopen(self) -> None:
        """The window goes on after its end, on all ranks."""
        self.next = "share"

    def share(self, value: T) -> list[T]:
        """What all ranks have to say; DistributedError where one has failed."""
        values: list[T | _RankFailure] = self.ranks.exchange(value)
        failures = [(rank, one) for rank, one in enumerate(values) if isinstance(one, _RankFailure)]
        if failures:
            self.next = None
            rank, failure = failures[0]
            raise DistributedError(f"rank {rank} failed in this window, which was rolled back on all. {failure.text}")
        values[self.ranks.rank] = value
        return values  # type: ignore[return-value]  # none is a failure

    def begin_again(self) -> None:
        """The denominators change: they are summed anew at the next `weigh`."""
        self._wait = self._totals = None
        self.next = "denominators"

    def around(self, schedule: Schedule, window: Window) -> Schedule:
        """As this process would; a rank on which nothing weighs anything looks for metrics all the same."""
        if len(window.idle) == len(window.micro_batches):
            self.read_totals()
            window.looks_at_idle = max(self.num_busy) > 0
        return schedule

    def first_row(self) -> int:
        """Where the rows of this process begin in the batch of all, in the order of ranks."""
        self.read_totals()
        return sum(self.num_rows[: self.ranks.rank])

    def _weigh_together(self, micro_batches: Sequence[MicroBatch]) -> WindowWeights:
        own = self._weigh_own(micro_batches)
        if self._wait is None:
            num_busy = len(micro_batches) - len(own.idle())
            self._wait = self.ranks.begin_gather([0.0, float(num_busy), *own.own_totals()])
        return _GlobalWeights(own, self.read_totals)

    def read_totals(self) -> list[float]:
        """The end of meeting [A]: the denominators, summed."""
        if self._totals is None:
            assert self._wait is not None
            failed, num_busy, *totals = zip(*self._wait(), strict=True)
            self.next = "share"
            if any(failed):
                self.share(None)  # raises
            self.num_busy = [int(count) for count in num_busy]
            self.num_rows = [int(count) for count in totals[-1]]
            self._totals = [math.fsum(of_ranks) for of_ranks in totals]
        return self._totals


class _GlobalWeights(WindowWeights):
    """Weights whose denominators are on their way."""

    def __init__(self, own: WindowWeights, read_totals: Callable[[], list[float]]) -> None:
        super().__init__(own.shares, own.samples)
        self._read_totals: Callable[[], list[float]] | None = read_totals

    def arrive(self) -> None:
        """Wait for the denominators."""
        if self._read_totals is not None:
            larger = self.of_totals(self._read_totals())
            self._read_totals = None
            self.shares, self.samples = larger.shares, larger.samples


def _refuse_differences(reports: Sequence[WindowReport]) -> None:
    """Raise DistributedError, on all ranks, where parameters do not stand alike on them."""
    for what, columns in (
        ("frozen", [[layout == "frozen" for layout in report.gradients] for report in reports]),
        ("found with a gradient", [report.found for report in reports]),
    ):
        differing = [index for index, of_ranks in enumerate(zip(*columns, strict=True)) if len(set(of_ranks)) > 1]
        if differing:
            raise DistributedError(
                f"{len(differing)} parameters (the first is number {differing[0]}) are {what} on some ranks and not on "
                "others, which would leave them different gradients. Freeze, and zero, alike on all ranks."
            )


def _common(layouts: Sequence[str | None]) -> str | None:
    """How ranks sum the gradient of one parameter: sparse where every one that has it has it so."""
    found = {layout for layout in layouts if layout not in (None, "frozen")}
    return None if not found else "sparse" if found == {"sparse"} else "dense"


Blank: TypeAlias = "tuple[Batch, list[str] | None]"
"""Rows for blank turns, and the loss terms that weigh something there (None: all)."""


class FsdpCoordinator(DataParallelCoordinator):
    """Several processes that hold a shard of every parameter each (FSDP2).

    Forward passes gather parameters and backward passes sum gradients, on all ranks at once. So all take as many turns
    as the one with the most micro-batches; blank ones have seeds of zero. Nothing can run again on one rank alone, and
    an error in the middle of a turn ends the training on all, as it does without gradfold.
    """

    can_replay = can_try = False

    def __init__(
        self, ranks: ProcessGroup, weigh: Weigh, num_totals: int, set_reducing: Callable[[bool], None]
    ) -> None:
        super().__init__(ranks, weigh, num_totals)
        self._set_reducing = set_reducing

    def end(self, losses: LossTerms, metrics: Metrics, gradients: GradientBuffer) -> None:
        """Meeting [B]; gradients are summed already."""
        losses.settle()
        reports = self.share(WindowReport(losses.own_sums(), metrics.sums(), [], []))
        losses.join([report.losses for report in reports])
        metrics.join([report.metrics for report in reports])
        self.next = "conclusion"

    def all_finite(self, is_finite: bool) -> bool:
        """Whether loss and gradient are finite, on all ranks, each of which sees a shard."""
        return self.ranks.all_well(is_finite)

    def around(self, schedule: Schedule, window: Window) -> Schedule:
        """The micro-batches that weigh something, then blank turns until all ranks have had as many."""

        def run(indices: Sequence[int], forward: Forward, backward: Backward) -> None:
            self.read_totals()
            busy = [index for index in indices if index not in window.idle]
            num_turns = max(self.num_busy)
            self.share(None)  # all are ready: from here on they are in the middle of turns
            self.next = None
            blank = self._blank(window, busy, num_turns)
            try:
                for turn in range(num_turns):
                    self._set_reducing(turn == num_turns - 1)
                    if turn < len(busy):
                        schedule([busy[turn]], forward, backward)
                    else:
                        window.back_propagate(_blank_terms(window, *blank))
            finally:
                self._set_reducing(True)
            self.next = "share"

        return run

    def _blank(self, window: Window, busy: Sequence[int], num_turns: int) -> Blank:
        """What runs in blank turns: rows that weigh something, since 0 times the gradient of others may be NaN."""
        own = (window.micro_batches[busy[0]].data, window.weights.names_at(busy[0])) if busy else (None, None)
        if min(self.num_busy) > 0 or not num_turns:
            return own
        donor = next(rank for rank, count in enumerate(self.num_busy) if count)
        given = self.ranks.exchange(own if self.ranks.rank == donor else (None, None))[donor]
        return own if busy else given


def _blank_terms(window: Window, batch: Batch, names: list[str] | None) -> list[tuple[Tensor, float]]:
    data = prefetch([MicroBatch(batch, range(0))], window.device)(0)
    output = window.loss_fn(window.model, data)
    terms = read_terms(read_pair(output)[0] if isinstance(output, tuple) else output)
    return [(term, 0.0) for name, term in terms.items() if names is None or name in names]
