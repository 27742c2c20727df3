"""The ranks that form the statistics of a window together, and how they stay in step.

Beside the synchronization points of every coordinator they meet at each joint call, in the forward and the backward
pass, and once at the end of either. There a rank that has failed says so: the others raise instead of waiting for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradfold.batchnorm.moments import Moments, merge
from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.errors import BatchNormError


class SynchronizedCoordinator(DataParallelCoordinator):
    """Several processes with one set of statistics; a single one cannot run again."""

    can_replay = False
    _is_awaited_at_layers = True  # by other ranks, until the backward pass of this one is done

    def _fail(self) -> None:
        if self._is_awaited_at_layers and self._denominators is not None:
            self.group.begin_gather([1.0, 0.0, 0.0])()
        else:
            super()._fail()

    def merge(self, own: Moments) -> Moments:
        """The moments of all ranks."""
        counts = self.meet_at_layer(own.count, len(own.mean))
        rows = self.group.gather(torch.stack([own.mean, own.variance]))
        return merge([Moments(mean, variance, count) for (mean, variance), count in zip(rows, counts, strict=True)])

    def sum(self, own: Tensor) -> Tensor:
        """The sum over all ranks, in the backward pass."""
        self.meet_at_layer()
        total = own.clone()
        self.group.all_reduce(total)
        return total

    def end_backward(self) -> None:
        """From here on the ranks synchronize as without BatchNorm."""
        self.meet_at_layer()
        self._is_awaited_at_layers = False

    def meet_at_layer(self, count: int = 0, channels: int = 0) -> list[int]:
        """Counts of all ranks; DistributedError where one has failed, BatchNormError where channels differ."""
        statuses = self.group.begin_gather([0.0, float(count), float(channels)])()
        if any(failed for failed, _, _ in statuses):
            self._is_awaited_at_layers = self.is_awaited = False
            self._gather(None)  # raises
        found = sorted({int(one) for _, _, one in statuses})
        if len(found) > 1:
            self._is_awaited_at_layers = False  # all ranks see it, and raise
            raise BatchNormError(
                f"ranks are at BatchNorm layers with {found} channels (0: at none): their forward passes diverge. "
                'batch_norm="exact" needs a loss_fn that calls the same layers for all rows of all ranks.',
                (),
            )
        return [int(count) for _, count, _ in statuses]
