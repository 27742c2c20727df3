"""THE ENGINE: a window is the micro-batches of one update; it makes one gradient out of them, or leaves no trace.

What it equals, for a loss that is a mean over something (samples, tokens) of which the batch holds W and micro-batch k
holds w[k]:

    loss_fn(model, batch).backward()        ==        for k, micro_batch in enumerate(micro_batches):
                                                          loss_fn(model, micro_batch).backward(gradient=w[k] / W)

The weight enters as the seed of the backward pass, so that no operation is added to the graph:

    [1] open       set aside .grad, keep the buffers that change, record the random state
    [2] cut        split, collate, weigh: w[0] ... w[K-1] and W are known
    [3] run        forward 0, backward 0, forward 1, backward 1, ...   (or another schedule)
    [4] close      loss and metrics of the window; add to .grad what was set aside
    [5] roll back  on any exception after [1]: everything as it was at [1]

Losses that couple the samples of a batch need another order of forwards and backwards. They plug in as a `Schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gradfold.backward import BackPropagation, Weighed
from gradfold.buffers import BufferKeeper
from gradfold.feed import feed
from gradfold.gradients import SetAside
from gradfold.loss import LossFn, LossTerms, read_pair
from gradfold.metric import Metrics
from gradfold.random_state import RandomState
from gradfold.split import MicroBatch
from gradfold.weight import WindowWeights

__all__ = ["WindowResult"]


@dataclass(frozen=True)
class WindowResult:
    """What a window gave besides the gradient.

    Attributes:
        loss: the loss of the whole batch (the sum of its terms' means), 0-d, detached, on the device; NaN where the
            window weighs nothing.
        metrics: by name: weighted means (0-d), rows in the batch's own order, and the means of named loss terms.
        num_micro_batches: how many micro-batches were run.
        num_samples: rows of the batch.
        weight: the denominator of the loss, or one per term where weights were given by name.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    num_micro_batches: int
    num_samples: int
    weight: float | Mapping[str, float]

    @property
    def is_empty(self) -> bool:
        """Whether the window weighed nothing, and so left no gradient."""
        weights = self.weight.values() if isinstance(self.weight, Mapping) else [self.weight]
        return not any(weights)


class Transaction:
    """Steps [1], [4] and [5]: on success the new gradients join the old, on any exception nothing has happened."""

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        buffers: BufferKeeper,
    ) -> None:
        self._model = model
        self._buffers = buffers
        self._random_state = RandomState.record(parameters)
        self._buffers.open(modules)
        self._gradients = SetAside(parameters)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._gradients.add_back()
            self._buffers.close()
        else:
            self._gradients.put_back(self._model.parameters())
            self._buffers.restore()
            self._random_state.restore()


Forward: TypeAlias = Callable[[int], Weighed]
"""Runs `loss_fn` on the micro-batch of this index; gives its loss terms, with their graph."""

Backward: TypeAlias = Callable[[Weighed], None]
"""Back-propagates what a forward gave."""

Schedule: TypeAlias = Callable[[Sequence[int], Forward, Backward], None]
"""Runs the forward of every index, then the backward of what it gave, in an order of its own: the seam for coupled
batches."""


def one_after_another(indices: Sequence[int], forward: Forward, backward: Backward) -> None:
    """The plain schedule: one micro-batch's activations are alive at a time."""
    for index in indices:
        backward(forward(index))


class OpenWindow:
    """A window being run: what its steps share."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        micro_batches: list[MicroBatch],
        weights: WindowWeights,
        back_propagate: BackPropagation,
        device: torch.device,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.micro_batches = micro_batches
        self.weights = weights
        self.idle = weights.idle()
        self.back_propagate = back_propagate
        self.device = device
        self.take = feed(micro_batches, device)
        self.losses = LossTerms(micro_batches, weights, device)
        self.metrics = Metrics(micro_batches, weights, device)

    def run(self, schedule: Schedule) -> WindowResult:
        """Steps [3] and the first half of [4]."""
        busy = [index for index in range(len(self.micro_batches)) if index not in self.idle]
        # Idle micro-batches come last: only then is it known whether there are metrics to be had from them.
        schedule(busy + sorted(self.idle), self._forward, self.back_propagate)
        self.weights.check_names(self.losses.names, self.metrics.names)
        loss, metrics = self.losses.close()
        if self.metrics.names:
            self.metrics.check_names(self.losses.names)
            metrics.update(self.metrics.close())
        num_samples = self.micro_batches[-1].rows.stop
        return WindowResult(loss, metrics, len(busy), num_samples, self.weights.total(self.losses.names))

    def _forward(self, index: int) -> Weighed:
        if index in self.idle:
            return self._forward_idle(index)
        output = self.loss_fn(self.model, self.take(index))
        if isinstance(output, tuple):
            output, metrics = read_pair(output)
            self.metrics.add(index, metrics)
        return self.losses.add(index, output)

    def _forward_idle(self, index: int) -> Weighed:
        """A micro-batch that weighs nothing is looked at only where there are metrics to be had from it."""
        if self.metrics.names:
            with torch.no_grad():
                output = self.loss_fn(self.model, self.take(index))
            if isinstance(output, tuple):
                self.metrics.add(index, read_pair(output)[1])
        return []
