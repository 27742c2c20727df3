"""Coordination: what the ranks tell each other in a window; here, for one process, which has nothing to tell.

There are four synchronization points in a window, and no others, since forward and backward passes reduce nothing:

    [A] denominators   begun before the first forward pass, read after it
    [B] end            every rank has run its micro-batches: sums of losses, which parameters have gradients
    [C] gradients      summed, in as few reductions as buckets; nothing that can fail is left to do in between
    [D] commit         no rank has failed: the gradient is handed over

A rank that fails still takes part in the next of these, reports its error, and raises it. The others raise
DistributedError with its text. So an error on one rank rolls the window back on all, and no rank hangs.
`distributed/coordinators.py` implements this for DistributedDataParallel and fully_shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from gradfold.engine.loss_terms import LossTerms
from gradfold.state.gradients import GradientBuffer
from gradfold.weights import WindowWeights

T = TypeVar("T")


class Coordinator(AbstractContextManager["Coordinator"]):
    """One process by itself: there is nothing to coordinate.

    Attributes:
        num_ranks, rank: how many processes train together, and which this one is.
        can_replay: whether micro-batches can run again on this rank alone.
        can_probe: whether this rank can run some rows by itself, as the self-check does.
        runs_in_step: whether micro-batches are run by `run_in_step`, since other ranks take part in their passes.
        runs_all_terms: whether loss terms of weight 0 are back-propagated, too, so that all ranks reduce the same.
        grad_factor: by which `grad_output` is multiplied, to undo a division of gradients by the number of ranks.
    """

    num_ranks = 1
    rank = 0
    can_replay = True
    can_probe = True
    runs_in_step = False
    runs_all_terms = False
    grad_factor = 1.0

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        pass

    def over_all_ranks(self, own: WindowWeights) -> WindowWeights:
        """Weights of this rank's micro-batches, normalized by the denominators of all ranks."""
        return own

    def run_in_step(self, run: Callable[..., None], window: Any, indices: Sequence[int], snapshot: Any) -> None:
        """Run micro-batches by `run`, where other ranks take part in their passes."""
        run(window, indices, snapshot)

    def end(self, losses: LossTerms, gradients: GradientBuffer) -> None:
        """Every micro-batch has run: make losses, metrics and gradients those of all ranks."""

    def commit(self) -> None:
        """Everything that can fail is done; from here on the gradient is final."""

    def meet(self, numbers: Sequence[float] = ()) -> list[float]:
        """Numbers, as many on every rank, summed over all."""
        return list(numbers)

    def exchange(self, value: T) -> list[T]:
        """One value of each rank, for what is rare: the list grows with their number."""
        return [value]

    def finish(self) -> None:
        """There are no more windows; raises where another rank has one."""

    def reset_weights(self) -> None:
        """The denominators change: they are summed again at the next `over_all_ranks`."""

    def all_finite(self, is_finite: bool) -> bool:
        """Whether loss and gradient are finite on all ranks."""
        return is_finite

    def first_row(self) -> int:
        """Where the rows of this rank begin in the batch of all ranks."""
        return 0

    def count_rows(self, own: int) -> int:
        """The rows of the batch of all ranks, of which this rank has its own."""
        return own
