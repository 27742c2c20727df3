"""An agreement: what the ranks tell each other in a window, so that none waits for one that has failed.

All of them meet four times, and nowhere else, since forward and backward passes reduce nothing:

    [A] denominators   begun before the first forward pass, read after it
    [B] end            every rank has run its micro-batches: loss sums, which parameters have gradients
    [C] gradients      summed, in as few reductions as buckets; nothing that can fail is left to do in between
    [D] conclusion     all are well: the gradient is handed over

A rank that fails goes to the next meeting all the same, says so, and raises its own error; the others raise
DistributedError
with its text. So an error on one rank ends the window on all, rolled back, and nobody hangs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TypeVar

from gradfold.batch.split import MicroBatch
from gradfold.engine.loss_terms import LossTerms
from gradfold.engine.metrics import Metrics
from gradfold.engine.window import Schedule, Window
from gradfold.state.gradients import GradientBuffer
from gradfold.weights import WindowWeights

__all__: list[str] = []

T = TypeVar("T")

Weigh = Callable[[Sequence[MicroBatch]], WindowWeights]


class Coordinator:
    """One process: nobody to agree with.

    Attributes:
        can_replay: whether micro-batches can run again on this rank alone.
        can_try: whether it can run some rows by itself, to see what comes of them.
    """

    can_replay = True
    can_try = True

    def __init__(self, weigh: Weigh) -> None:
        self.weigh = weigh

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def end(self, losses: LossTerms, metrics: Metrics, gradients: GradientBuffer) -> None:
        """Every micro-batch has run: make losses, metrics and gradients those of all ranks."""

    def conclude(self) -> None:
        """All is done that can fail; from here on the gradient stands."""

    def reopen(self) -> None:
        """The window goes on after its end, on all ranks."""

    def share(self, value: T) -> list[T]:
        """What all ranks have to say."""
        return [value]

    def begin_again(self) -> None:
        """The denominators change: they are summed anew at the next `weigh`."""

    def all_finite(self, is_finite: bool) -> bool:
        """Whether loss and gradient are finite, on all ranks; whole gradients are the same on all."""
        return is_finite

    def first_row(self) -> int:
        """Where the rows of this process begin in the batch of all."""
        return 0

    def around(self, schedule: Schedule, window: Window) -> Schedule:
        """How to run the window, given how this process would."""
        return schedule
