"""Shards: what ranks agree on where each holds a part of every parameter (fully_shard), and how they take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from gradfold.agreement import Report, Together, Weigh
from gradfold.batch import Batch
from gradfold.feed import feed
from gradfold.gradients import SetAside
from gradfold.loss import LossTerms, read_pair, read_terms
from gradfold.metric import Metrics
from gradfold.ranks import Ranks
from gradfold.split import MicroBatch
from gradfold.window import Backward, Forward, OpenWindow, Schedule

__all__: list[str] = []


Blank: TypeAlias = "tuple[Batch, list[str] | None]"
"""Rows for blank turns, and the loss terms that weigh something there (None: all)."""


class Sharded(Together):
    """Several processes that hold a shard of every parameter each (FSDP2).

    Forward passes gather parameters and backward passes sum gradients, on all ranks at once. So all take as many turns
    as the one with the most micro-batches; blank ones have seeds of zero. Nothing can run again on one rank alone, and
    an error in the middle of a turn ends the training on all, as it does without gradfold.
    """

    can_replay = can_try = False

    def __init__(self, ranks: Ranks, weigh: Weigh, num_totals: int, set_reducing: Callable[[bool], None]) -> None:
        super().__init__(ranks, weigh, num_totals)
        self._set_reducing = set_reducing

    def end(self, losses: LossTerms, metrics: Metrics, gradients: SetAside) -> None:
        """Meeting [B]; gradients are summed already."""
        losses.settle()
        reports = self.share(Report(losses.own_sums(), metrics.sums(), [], []))
        losses.join([report.losses for report in reports])
        metrics.join([report.metrics for report in reports])
        self.next = "conclusion"

    def all_finite(self, is_finite: bool) -> bool:
        """Whether loss and gradient are finite, on all ranks, each of which sees a shard."""
        return self.ranks.all_well(is_finite)

    def around(self, schedule: Schedule, window: OpenWindow) -> Schedule:
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

    def _blank(self, window: OpenWindow, busy: Sequence[int], num_turns: int) -> Blank:
        """What runs in blank turns: rows that weigh something, since 0 times the gradient of others may be NaN."""
        own = (window.micro_batches[busy[0]].data, window.weights.names_at(busy[0])) if busy else (None, None)
        if min(self.num_busy) > 0 or not num_turns:
            return own
        donor = next(rank for rank, count in enumerate(self.num_busy) if count)
        given = self.ranks.exchange(own if self.ranks.rank == donor else (None, None))[donor]
        return own if busy else given


def _blank_terms(window: OpenWindow, batch: Batch, names: list[str] | None) -> list[tuple[Tensor, float]]:
    data = feed([MicroBatch(batch, range(0))], window.device)(0)
    output = window.loss_fn(window.model, data)
    terms = read_terms(read_pair(output)[0] if isinstance(output, tuple) else output)
    return [(term, 0.0) for name, term in terms.items() if names is None or name in names]
