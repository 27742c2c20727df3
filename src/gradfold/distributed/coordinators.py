"""Coordination of the ranks that train one model; the synchronization points are in `engine/coordinator.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from gradfold.distributed.agreement import NUM_NUMBERS, digest, is_common
from gradfold.distributed.process_group import ProcessGroup, Reduction, is_lost
from gradfold.distributed.settings import RankSettings, refuse_differing
from gradfold.distributed.term_names import TermNames
from gradfold.engine.coordinator import Coordinator
from gradfold.engine.loss_terms import LossTerms, TermSums
from gradfold.errors import DistributedError
from gradfold.state.gradients import DENSE, FOUND, FROZEN, SPARSE, GradientBuffer
from gradfold.weights import WindowWeights

T = TypeVar("T")

_SIZE = 32  # numbers in every message, which a rank that fails sends without knowing what the others say


@dataclass(frozen=True)
class _RankFailure:
    text: str


class DataParallelCoordinator(Coordinator):
    """Several processes that hold the whole model each.

    At each synchronization point all ranks sum a few numbers, of which the first says how many have failed. Text is
    gathered where some have, or where a digest differs.

    Attributes:
        is_awaited: whether the others wait, or will, for what this rank says next.
        overlaps: whether the last backward pass of this window sums gradients.
    """

    def __init__(self, group: ProcessGroup, settings: RankSettings) -> None:
        self.group = group
        self.num_ranks, self.rank = group.size, group.rank
        self.is_awaited = True
        self.overlaps = False
        self._settings = settings
        self._receive: Callable[[], list[float]] | None = None  # the end of [A], once it has begun
        self._denominators: list[float] | None = None  # what it gave
        self._own: WindowWeights  # of this rank
        self._totals: list[float] = []  # its denominators, the last one of rows
        self._rows_of_ranks: list[int] | None = None  # where they differ and their places count

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None or not self.is_awaited:
            self.is_awaited = False
            return
        if self._receive is not None:
            try:
                self.read_denominators()
            except DistributedError:  # other ranks have failed, too
                return
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, GeneratorExit):  # of a loop over a window, which Python does not tell what ended it
            text = "Its loop over the window was left before its end, by an error that it shows, a break or a return."
        self.is_awaited = False
        self._fail()
        self.group.exchange(_RankFailure(f"rank {self.rank} failed; the window was rolled back on all ranks. {text}"))

    def meet(self, numbers: Sequence[float] = ()) -> list[float]:
        """Numbers, as many on every rank, summed over all; DistributedError where one has failed."""
        return self._begin(numbers)()

    def over_all_ranks(self, own: WindowWeights) -> WindowWeights:
        """The beginning of [A]: weights whose denominators are being summed."""
        if self._receive is None:
            self._own, self._totals = own, own.own_totals()
            rows = self._totals[-1]
            first = [*self._settings.digest(), rows, rows**2, float(self._can_overlap()), *self._totals]
            self._receive = self._begin(first[: _SIZE - 1])
        return own.over(self.read_denominators)

    def read_denominators(self) -> list[float]:
        """The end of [A]: the denominators, summed over ranks."""
        if self._denominators is None:
            assert self._receive is not None
            sums = self._receive()
            if not is_common(sums[:NUM_NUMBERS], self.num_ranks):
                self._settings.names.learn(self._compare(self._settings))
            self.overlaps = sums[NUM_NUMBERS + 2] == self.num_ranks
            found, rest = sums[NUM_NUMBERS + 3 :], self._totals[_SIZE - NUM_NUMBERS - 4 :]
            if rest:
                found += self.meet(rest)
            if self._settings.places_rows and not is_common(sums[NUM_NUMBERS : NUM_NUMBERS + 2], self.num_ranks):
                self._rows_of_ranks = [int(rows) for (rows,) in self.group.begin_gather(self._totals[-1:])()]
            self._denominators = found
        return self._denominators

    def end(self, losses: LossTerms, gradients: GradientBuffer) -> None:
        """[B] and [C]."""
        self.read_denominators()
        losses.settle()
        # Whatever takes memory comes before the exchange: after it the others wait.
        reduction, layouts = Reduction(self.group, gradients.parameters), gradients.layouts()
        gradients.fill()
        is_alike = self._join(losses, layouts)
        summed = gradients.in_layouts(layouts if is_alike else self._merge(layouts))
        if not is_alike:  # that took memory
            self.meet()
        reduction.run(summed)

    def commit(self) -> None:
        """[D]; DistributedError where another rank has failed since the end."""
        self.is_awaited = False
        self.meet()

    def exchange(self, value: T) -> list[T]:
        """One value of each rank; DistributedError where one has failed."""
        self.meet()
        return self._gather(value)

    def finish(self) -> None:
        """This rank has no more windows; DistributedError, on all ranks, where another one has."""
        self.is_awaited = False
        num_ended, num_finished, *_ = self.group.begin_sum([1.0, 1.0, *[0.0] * _SIZE][:_SIZE])()
        if num_ended < self.num_ranks or num_finished < num_ended:
            self._gather(
                _RankFailure(
                    f"rank {self.rank} has no more windows, and other ranks have, so theirs were rolled back. Give all "
                    "ranks as many micro-batches: DistributedSampler(dataset) does."
                )
            )

    def reset_weights(self) -> None:
        """The denominators change: they are summed again at the next `over_all_ranks`."""
        self._receive = self._denominators = None

    def first_row(self) -> int:
        """Where the rows of this rank begin in the batch of all, in the order of ranks."""
        self.read_denominators()
        if self._rows_of_ranks is None:
            return self.rank * int(self._totals[-1])
        return sum(self._rows_of_ranks[: self.rank])

    def count_rows(self, own: int) -> int:
        """The rows of the batch of all ranks."""
        return int(self.read_denominators()[-1])

    def _begin(self, numbers: Sequence[float]) -> Callable[[], list[float]]:
        receive = self.group.begin_sum([0.0, *numbers, *[0.0] * _SIZE][:_SIZE])
        rest = numbers[_SIZE - 1 :]

        def wait() -> list[float]:
            try:
                num_failed, *sums = receive()
            except RuntimeError as error:
                if not is_lost(error):
                    raise
                self.is_awaited = False  # whoever is left finds out as well
                raise DistributedError(
                    "another rank has ended or cannot be reached, while this one waited for it in a window; the window "
                    "was rolled back. Look at the output of that rank; without an error there it had fewer windows."
                ) from error
            if num_failed:
                self.is_awaited = False
                self._gather(None)  # raises
            return sums[: len(numbers)] + (self.group.begin_sum(rest)() if rest else [])

        return wait

    def _can_overlap(self) -> bool:
        """Whether this rank has a backward pass in which gradients can be summed."""
        return False

    def _fail(self) -> None:
        """Take part in what the others wait for, as a rank that has failed; they gather texts next."""
        self.group.begin_sum([1.0, *[0.0] * _SIZE][:_SIZE])()

    def _gather(self, value: T) -> list[T]:
        values: list[T | _RankFailure] = self.group.exchange(value)
        for failure in values:
            if isinstance(failure, _RankFailure):
                self.is_awaited = False
                raise DistributedError(failure.text)
        values[self.rank] = value
        return values  # type: ignore[return-value]  # none is a failure

    def _compare(self, own: RankSettings) -> list[TermNames]:
        """Raise DistributedError, on all ranks, where their settings differ; else give the names that each knows."""
        found = self._gather(own)
        self.is_awaited = False
        refuse_differing(found)
        self.is_awaited = True
        return [settings.names for settings in found]

    def _join(self, losses: LossTerms, layouts: bytes) -> bool:
        """[B]: make losses and metrics those of all ranks; gives whether all have the same layouts of gradients."""
        own, names = losses.own_sums(), self._settings.names
        first = [*digest(layouts), 0.0 if names.cover(own) else 1.0]
        sums = self.meet([*first, *names.pack(own, self._weighs)])
        of_terms = sums[len(first) :]
        if sums[len(first) - 1]:
            names.learn(self._gather(TermNames.of(own)))
            of_terms = self.meet(names.pack(own, self._weighs))
        joined, lacking = names.unpack(of_terms)
        if lacking:
            self._refuse_terms(own, lacking)
        losses.join(joined)
        return is_common(sums[:NUM_NUMBERS], self.num_ranks)

    def _weighs(self, term: str) -> bool:
        weights = self._own.unnamed or self._own.named.get(term)
        return weights is not None and any(weights.values)

    def _refuse_terms(self, own: TermSums, lacking: Sequence[str]) -> None:
        """Raise DistributedError, on all ranks: a term that weighs something on a rank has no value there."""
        lacks = any(self._weighs(name) and name not in own.values for name in lacking)
        found = self._gather((lacks, sorted(own.values)))
        rank, terms = next((rank, terms) for rank, (is_one, terms) in enumerate(found) if is_one)
        every = sorted({name for _, of_rank in found for name in of_rank})
        self.is_awaited = False
        raise DistributedError(
            f"rank {rank} returned the loss terms {terms}, others {every}. Return the same names on all ranks; a term "
            "may be left out only where its weight is 0."
        )

    def _merge(self, layouts: bytes) -> bytes:
        """The layouts of all ranks; DistributedError, on all, where they cannot be one."""
        own, flags = torch.tensor(list(layouts), dtype=torch.uint8), (FROZEN, DENSE, SPARSE, FOUND)
        has = torch.stack([own & flag for flag in flags]).bool()
        self.meet()
        of_some, not_of_all = self.group.maximum(torch.stack([has, ~has]).byte()).bool()
        for what, row in ("frozen", 0), ("found with a gradient", 3):
            differing = (of_some[row] & not_of_all[row]).nonzero().flatten().tolist()
            if differing:
                self.is_awaited = False
                raise DistributedError(
                    f"{len(differing)} parameters (the first is number {differing[0]}) are {what} on some ranks and "
                    "not on others, so ranks would end with different gradients. Freeze and zero the same on all ranks."
                )
        return bytes(sum(torch.tensor(flags)[:, None] * of_some).tolist())
