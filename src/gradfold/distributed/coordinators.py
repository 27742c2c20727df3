"""Coordination of the ranks that train one model; the synchronization points are in `engine/coordinator.py`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from torch import Tensor

from gradfold.batch.nesting import Batch
from gradfold.batch.split import MicroBatch
from gradfold.distributed.fsdp import set_reducing, sharded_modules
from gradfold.distributed.process_group import ProcessGroup, Reduction
from gradfold.distributed.settings import RankSettings, refuse_differing
from gradfold.distributed.torch_private import drop_turn
from gradfold.engine.coordinator import Coordinator
from gradfold.engine.loss_terms import LossTerms, TermSums, loss_terms_of
from gradfold.engine.prefetch import prefetch
from gradfold.engine.strategy import Run
from gradfold.engine.window import Window
from gradfold.errors import DistributedError
from gradfold.state.gradients import GradientBuffer
from gradfold.state.snapshot import Snapshot
from gradfold.weights import WindowWeights

T = TypeVar("T")

_FAILED = -1.0  # in place of a digest
_NUM_DENOMINATORS = 3  # in the first message, which has one size on all ranks, whatever their options


@dataclass(frozen=True)
class _RankFailure:
    text: str


@dataclass(frozen=True)
class WindowReport:
    """What a rank reports at the end of its micro-batches."""

    losses: TermSums
    gradients: list[str | None]
    found: list[bool]


class DataParallelCoordinator(Coordinator):
    """Several processes that hold the whole model each.

    Attributes:
        num_busy, num_rows: micro-batches that weigh something, and rows, by rank; known with the denominators.
        next: the synchronization point at which others would wait; None where there is none.
    """

    def __init__(self, group: ProcessGroup, settings: RankSettings) -> None:
        self.group = group
        self.num_ranks, self.rank = group.size, group.rank
        self._settings = settings
        self.receive: Callable[[], list[list[float]]] | None = None  # the end of [A], once it has begun
        self.denominators: list[float] | None = None  # what it gave, summed
        self.num_busy: list[int] = []
        self.num_rows: list[int] = []
        self._totals: list[list[float]] = []  # the denominators of each rank
        self._names: list[str] = []  # of weights that have names
        self.next: Literal["denominators", "exchange", "commit"] | None = "denominators"

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        at, self.next = self.next, None
        if error is None:
            return
        if at == "denominators" and self.receive is None:
            self.group.begin_gather([_FAILED, 0.0] + [0.0] * _NUM_DENOMINATORS)()
        elif at == "commit":
            self.group.all_well(False)
        elif self.receive is not None and self.denominators is None:
            self.receive()
        if at is not None:
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, GeneratorExit):  # of a loop over a window, which Python does not tell what ended it
                text = (
                    "Its loop over the window was left before its end, by an error that it shows, a break or a return."
                )
            self.group.exchange(_RankFailure(text))

    def over_all_ranks(self, own: WindowWeights) -> WindowWeights:
        """The beginning of [A]: weights whose denominators are being summed."""
        if self.receive is None:
            busy = len(own.samples.values) - len(own.zero_weight)
            totals = own.own_totals()
            first = [*totals, *[0.0] * _NUM_DENOMINATORS][:_NUM_DENOMINATORS]
            receive = self.group.begin_gather([self._settings.digest, float(busy), *first])
            self.receive = receive if len(totals) <= _NUM_DENOMINATORS else partial(self._receive_more, receive, totals)
            self._num_denominators, self._names = len(totals), list(own.named)
        return own.over(self.read_denominators)

    def _receive_more(self, receive: Callable[[], list[list[float]]], totals: list[float]) -> list[list[float]]:
        """The first message with the totals that have no place in it, where ranks agree on how many there are."""
        first = receive()
        if len({digest for digest, *_ in first}) > 1:
            return first
        rest = self.group.begin_gather(totals)()
        return [[*head[:2], *of_rank] for head, of_rank in zip(first, rest, strict=True)]

    def read_denominators(self) -> list[float]:
        """The end of [A]: the denominators, summed over ranks."""
        if self.denominators is None:
            assert self.receive is not None
            of_ranks = self.receive()
            digests, num_busy, *totals = zip(*of_ranks, strict=True)
            self.next = "exchange"
            if _FAILED in digests:
                self.exchange(None)  # raises
            if len(set(digests)) > 1:
                settings = self.exchange(self._settings)
                self.next = None  # all ranks raise
                refuse_differing(settings)
            self._totals = [totals for _, _, *totals in of_ranks]
            totals = totals[: self._num_denominators]
            self.num_busy = [int(count) for count in num_busy]
            self.num_rows = [int(count) for count in totals[-1]]
            self.denominators = [math.fsum(of_ranks) for of_ranks in totals]
        return self.denominators

    def end(self, losses: LossTerms, gradients: GradientBuffer) -> None:
        """[B] and [C]."""
        self.read_denominators()
        losses.settle()
        # Whatever takes memory comes before the exchange: after it the others wait.
        reduction, layouts = Reduction(self.group, gradients.parameters), gradients.layouts()
        gradients.fill()
        reports = self._join(losses, layouts, gradients.are_found())
        _check_alike(reports)
        common = [_common(of_parameter) for of_parameter in zip(*[one.gradients for one in reports], strict=True)]
        reduction.run(gradients.in_layouts(common))
        self.next = "commit"

    def _join(self, losses: LossTerms, layouts: list[str | None], found: list[bool]) -> list[WindowReport]:
        """Make losses and metrics those of all ranks; what each of them reports."""
        reports = self.exchange(WindowReport(losses.own_sums(), layouts, found))
        self._check_terms([report.losses.values for report in reports])
        losses.join([report.losses for report in reports])
        return reports

    def _check_terms(self, of_ranks: Sequence[Mapping[str, float]]) -> None:
        """Raise DistributedError, on all ranks, where a term that weighs something on a rank has no value there."""
        terms = set().union(*of_ranks)
        for rank, (own, totals) in enumerate(zip(of_ranks, self._totals, strict=True)):
            weights = dict(zip(self._names, totals, strict=False)) or dict.fromkeys(terms, totals[0])
            if any(weights.get(name) for name in terms - own.keys()):
                self.next = None  # all ranks raise
                raise DistributedError(
                    f"rank {rank} returned the loss terms {sorted(own)}, others {sorted(terms)}. Return the same names "
                    "on all ranks; a term may be left out only where its weight is 0."
                )

    def commit(self) -> None:
        """[D]; DistributedError where another rank has failed since the end."""
        self.next = None
        if not self.group.all_well(True):
            self.exchange(None)  # raises

    def reopen(self) -> None:
        """The window continues after its end, on all ranks."""
        self.next = "exchange"

    def exchange(self, value: T) -> list[T]:
        """One value of each rank; DistributedError where one has failed."""
        values: list[T | _RankFailure] = self.group.exchange(value)
        failures = [(rank, one) for rank, one in enumerate(values) if isinstance(one, _RankFailure)]
        if failures:
            self.next = None
            rank, failure = failures[0]
            raise DistributedError(f"rank {rank} failed; the window was rolled back on all ranks. {failure.text}")
        values[self.group.rank] = value
        return values  # type: ignore[return-value]  # none is a failure

    def reset_weights(self) -> None:
        """The denominators change: they are summed again at the next `over_all_ranks`."""
        self.receive = self.denominators = None
        self.next = "denominators"

    def first_row(self) -> int:
        """Where the rows of this rank begin in the batch of all, in the order of ranks."""
        self.read_denominators()
        return sum(self.num_rows[: self.group.rank])

    def count_rows(self, own: int) -> int:
        """The rows of the batch of all ranks."""
        self.read_denominators()
        return sum(self.num_rows)


class FsdpCoordinator(DataParallelCoordinator):
    """Several processes that hold a shard of every parameter each (FSDP2).

    Forward passes gather parameters and backward passes sum gradients, on all ranks at once: see `take_turns`. Nothing
    can run again on one rank alone.
    """

    can_replay = can_probe = False
    runs_all_terms = True

    def __init__(self, group: ProcessGroup, settings: RankSettings, grad_factor: float) -> None:
        super().__init__(group, settings)
        self.grad_factor = grad_factor

    def end(self, losses: LossTerms, gradients: GradientBuffer) -> None:
        """[B]; gradients are summed already."""
        losses.settle()
        self._join(losses, [], [])
        self.next = "commit"

    def all_finite(self, is_finite: bool) -> bool:
        """Whether loss and gradient are finite on all ranks, each of which sees a shard."""
        return self.group.all_well(is_finite)


def _check_alike(reports: Sequence[WindowReport]) -> None:
    """Raise DistributedError, on all ranks, where parameters differ between them."""
    for what, columns in (
        ("frozen", [[layout == "frozen" for layout in report.gradients] for report in reports]),
        ("found with a gradient", [report.found for report in reports]),
    ):
        differing = [index for index, of_ranks in enumerate(zip(*columns, strict=True)) if len(set(of_ranks)) > 1]
        if differing:
            raise DistributedError(
                f"{len(differing)} parameters (the first is number {differing[0]}) are {what} on some ranks and not on "
                "others, so ranks would end with different gradients. Freeze and zero the same on all ranks."
            )


def _common(layouts: Sequence[str | None]) -> str | None:
    """How ranks sum the gradient of one parameter: sparse where every one that has it has it so."""
    found = {layout for layout in layouts if layout not in (None, "frozen")}
    return None if not found else "sparse" if found == {"sparse"} else "dense"


def take_turns(
    coordinator: FsdpCoordinator,
    run: Run,
    reduces_once: bool,
    window: Window,
    indices: Sequence[int],
    snapshot: Snapshot,
) -> None:
    """Take as many turns as the rank with the most micro-batches of positive weight, with no-op steps at the end.

    `reduces_once` sums gradients over ranks in the last turn alone. An error in the middle of a turn is rolled back
    where all ranks have it; an error on one rank ends the training, as it does without gradfold.
    """
    coordinator.read_denominators()
    busy = [index for index in indices if index not in window.zero_weight]
    num_turns = max(coordinator.num_busy)
    sharded = sharded_modules(window.context.modules)
    coordinator.exchange(None)  # all are ready: from here on they are in the middle of turns
    coordinator.next = None
    no_op = _no_op_rows(coordinator, window, busy)
    try:
        for turn in range(num_turns):
            set_reducing(sharded, turn == num_turns - 1 or not reduces_once)
            if turn < len(busy):
                run(window, [busy[turn]], snapshot)
            else:
                window.backward(_no_op_terms(window, no_op))
    except BaseException:
        drop_turn(sharded)
        raise
    finally:
        set_reducing(sharded, True)
        for module in sharded:  # else the gradients of the model's parameters are not those of its shards
            module.reshard()
    coordinator.next = "exchange"


def _no_op_rows(coordinator: FsdpCoordinator, window: Window, busy: Sequence[int]) -> Batch:
    """What runs in no-op steps: rows of positive weight, since 0 times the gradient of others may be NaN."""
    own = window.micro_batches[busy[0]].data if busy else None
    is_busy = list(map(bool, coordinator.num_busy))
    if all(is_busy) or not any(is_busy):
        return own
    donor = is_busy.index(True)
    given = coordinator.group.exchange(own if coordinator.rank == donor else None)[donor]
    return own if busy else given


def _no_op_terms(window: Window, batch: Batch) -> list[tuple[Tensor, float]]:
    data = prefetch([MicroBatch(batch, range(0))], window.device)(0)
    return [(term, 0.0) for term in loss_terms_of(window.loss_fn(window.model, data)).values()]
