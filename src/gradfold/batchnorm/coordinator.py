"""A company: the ranks that form the statistics of a window together, and the agreement between them.

Beside the four meetings of `agreement.py` they meet at every joint call, in forward and backward order, and once when
forward passes and once when the backward pass is through. Each of these meetings begins with a *greeting* of three
numbers, in which a rank that has failed says so, so that none waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from gradfold.batchnorm.moments import Moments, merge
from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.distributed.process_group import ProcessGroup
from gradfold.engine.coordinator import Weigh
from gradfold.engine.window import Backward, Forward, Schedule, Window
from gradfold.errors import BatchNormError, DistributedError

__all__: list[str] = []


class StatisticsGroup(Protocol):
    """Those whose rows are in the same statistics.

    Attributes:
        meets_in_backward: whether there are others to meet there.
    """

    meets_in_backward: bool

    def merge(self, own: Moments) -> Moments: ...
    def sum(self, own: Tensor) -> Tensor: ...
    def begin_token(self, device: torch.device) -> Tensor: ...
    def end_forward(self) -> None: ...
    def end_backward(self) -> None: ...


class LocalStatisticsGroup:
    """Nobody else's."""

    meets_in_backward = False

    def merge(self, own: Moments) -> Moments:
        """The moments of all ranks."""
        return own

    def sum(self, own: Tensor) -> Tensor:
        """The sum over all ranks, in the backward pass."""
        return own

    def begin_token(self, device: torch.device) -> Tensor:
        """What goes into the first joint call."""
        return torch.zeros((), device=device)

    def end_forward(self) -> None:
        """All forward passes of this rank are through."""

    def end_backward(self) -> None:
        """And the backward pass."""


class SynchronizedCoordinator(DataParallelCoordinator):
    """Several processes whose micro-batches are in one set of statistics; none can run again by itself."""

    can_replay = False
    meets_in_backward = True

    def __init__(self, ranks: ProcessGroup, weigh: Weigh, num_totals: int) -> None:
        super().__init__(ranks, weigh, num_totals)
        self._may_be_greeted = True  # by others, until this rank is through with its micro-batches

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self._may_be_greeted and self._wait is not None and self.next is not None:
            with suppress(DistributedError):  # where others have failed before their first greeting
                self.read_totals()
                self._may_be_greeted = False
                self.ranks.begin_gather([1.0, 0.0, 0.0])()
        super().__exit__(kind, error, traceback)

    def around(self, schedule: Schedule, window: Window) -> Schedule:
        """As this process would, once all have come so far; what weighs nothing runs as the rest."""

        def run(indices: Sequence[int], forward: Forward, backward: Backward) -> None:
            self.read_totals()
            schedule(indices, forward, backward)

        return run

    def merge(self, own: Moments) -> Moments:
        """The moments of all ranks."""
        channels = len(own.mean)
        counts = [int(count) for count, _ in self._greet(own.count, channels)]
        rows = self.ranks.gather(torch.stack([own.mean, own.variance]))
        return merge([Moments(mean, variance, count) for (mean, variance), count in zip(rows, counts, strict=True)])

    def sum(self, own: Tensor) -> Tensor:
        """The sum over all ranks, in the backward pass."""
        self._greet(0, 0)
        return self.ranks.sum(own)

    def begin_token(self, device: torch.device) -> Tensor:
        """What goes into the first joint call: every joint call is in the graph, on every rank."""
        return torch.zeros((), device=device, requires_grad=True)

    def end_forward(self) -> None:
        """All forward passes of this rank are through."""
        self._greet(0, 0)

    def end_backward(self) -> None:
        """And the backward pass: from here on all meet as if there were no BatchNorm."""
        self._greet(0, 0)
        self._may_be_greeted = False

    def _greet(self, count: int, channels: int) -> list[tuple[float, float]]:
        """Counts and channels of all ranks; DistributedError where one has failed."""
        greetings = self.ranks.begin_gather([0.0, float(count), float(channels)])()
        if any(failed for failed, _, _ in greetings):
            self._may_be_greeted = False
            self.share(None)  # raises
        if len({channels for _, _, channels in greetings}) > 1:
            self._may_be_greeted = False  # all ranks see it, and raise
            found = sorted({int(one) for _, _, one in greetings})
            raise BatchNormError(
                f"ranks are at BatchNorm layers with {found} channels (0: at none): "
                'their forward passes take different ways. batch_norm="exact" needs a loss_fn that calls the same '
                "layers for all rows of all ranks.",
                (),
            )
        return [(count, channels) for _, count, channels in greetings]
