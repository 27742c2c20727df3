"""Counters of batches: `num_batches_tracked`, which counts a batch once however many micro-batches it has.

In layers of torch's own an `Interception` lets the first micro-batch count alone. A layer whose forward is the user's
may count in any way (`self.num_batches_tracked = self.num_batches_tracked + 1`), so what stands there is put back.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__: list[str] = []

_NAME = "num_batches_tracked"
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class OwnCounters:
    """The counters of those layers whose forward is none of torch's."""

    def __init__(self, layers: Iterable[_BatchNorm]) -> None:
        self._layers = [
            layer for layer in layers if type(layer).forward not in _FORWARDS and layer._buffers.get(_NAME) is not None
        ]
        self._kept: list[tuple[_BatchNorm, Tensor, Tensor]] = []

    def keep(self) -> None:
        """The first micro-batch has come to a meeting, or to its end."""
        self._kept = []
        for layer in self._layers:
            counter = layer._buffers[_NAME]
            assert counter is not None
            self._kept.append((layer, counter, counter.detach().clone()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Another one has: it has counted, too."""
        for layer, counter, value in self._kept:
            layer._buffers[_NAME] = counter
            counter.copy_(value)
