"""The ranks that form the statistics of a window together, and how they stay in step.

Beside the synchronization points of every coordinator they meet at each joint call, in the forward and the backward
pass, and once at the end of either. Each of these points begins with an all-gather of a *status* of three numbers, in
which a rank that has failed says so: the others raise instead of waiting for it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TypeAlias

import torch
from torch import Tensor

from gradfold.batchnorm.moments import Moments, merge
from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.distributed.process_group import ProcessGroup
from gradfold.errors import BatchNormError, DistributedError


class LocalStatisticsGroup:
    """One process alone: the null object of `SynchronizedCoordinator`."""

    synchronizes_backward = False

    def merge(self, own: Moments) -> Moments:
        """Its own moments."""
        return own

    def sum(self, own: Tensor) -> Tensor:
        """Its own sum."""
        return own

    def end_forward(self) -> None:
        """No other rank waits."""

    def end_backward(self) -> None:
        """No other rank waits."""


class SynchronizedCoordinator(DataParallelCoordinator):
    """Several processes with one set of statistics; a single one cannot run again."""

    can_replay = False
    synchronizes_backward = True

    def __init__(self, group: ProcessGroup, num_denominators: int) -> None:
        super().__init__(group, num_denominators)
        self._may_be_waited_for = True  # by other ranks, until the backward pass of this one is done

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None and self._may_be_waited_for and self.receive is not None and self.next is not None:
            with suppress(DistributedError):  # where others have failed before their first status
                self.read_denominators()
                self._may_be_waited_for = False
                self.group.begin_gather([1.0, 0.0, 0.0])()
        super().__exit__(kind, error, traceback)

    def merge(self, own: Moments) -> Moments:
        """The moments of all ranks."""
        channels = len(own.mean)
        counts = [int(count) for count, _ in self._gather_status(own.count, channels)]
        rows = self.group.gather(torch.stack([own.mean, own.variance]))
        return merge([Moments(mean, variance, count) for (mean, variance), count in zip(rows, counts, strict=True)])

    def sum(self, own: Tensor) -> Tensor:
        """The sum over all ranks, in the backward pass."""
        self._gather_status(0, 0)
        return self.group.sum(own)

    def end_forward(self) -> None:
        """All forward passes of this rank are done."""
        self._gather_status(0, 0)

    def end_backward(self) -> None:
        """From here on the ranks synchronize as without BatchNorm."""
        self._gather_status(0, 0)
        self._may_be_waited_for = False

    def _gather_status(self, count: int, channels: int) -> list[tuple[float, float]]:
        """Counts and channels of all ranks; DistributedError where one has failed."""
        statuses = self.group.begin_gather([0.0, float(count), float(channels)])()
        if any(failed for failed, _, _ in statuses):
            self._may_be_waited_for = False
            self.exchange(None)  # raises
        if len({channels for _, _, channels in statuses}) > 1:
            self._may_be_waited_for = False  # all ranks see it, and raise
            found = sorted({int(one) for _, _, one in statuses})
            raise BatchNormError(
                f"ranks are at BatchNorm layers with {found} channels (0: at none): their forward passes diverge. "
                'batch_norm="exact" needs a loss_fn that calls the same layers for all rows of all ranks.',
                (),
            )
        return [(count, channels) for _, count, channels in statuses]


StatisticsGroup: TypeAlias = LocalStatisticsGroup | SynchronizedCoordinator
"""The ranks whose rows are in the same statistics."""
