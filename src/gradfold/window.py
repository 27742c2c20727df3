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
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from gradfold.backward import BackPropagation
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


class MicroStep(Protocol):
    """The forward and backward pass of one micro-batch, in an order that a schedule decides."""

    def forward(self) -> None:
        """Run `loss_fn` and keep its loss, with the graph."""

    def backward(self) -> None:
        """Back-propagate the loss that `forward` kept, and let the graph go."""


Schedule: TypeAlias = Callable[[Sequence[MicroStep]], None]
"""Runs every step's forward, then its backward, in an order of its own: the seam for coupled batches."""


def one_after_another(steps: Sequence[MicroStep]) -> None:
    """The plain schedule: one micro-batch's activations are alive at a time."""
    for step in steps:
        step.forward()
        step.backward()


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
        self.back_propagate = back_propagate
        self.take = feed(micro_batches, device)
        self.losses = LossTerms(micro_batches, weights, device)
        self.metrics = Metrics(micro_batches, weights, device)

    def run(self, schedule: Schedule) -> WindowResult:
        """Steps [3] and the first half of [4]."""
        idle = self.weights.idle()
        steps: list[MicroStep] = [
            _BusyStep(self, index) for index in range(len(self.micro_batches)) if index not in idle
        ]
        num_busy = len(steps)
        # Idle micro-batches come last: only then is it known whether there are metrics to be had from them.
        steps += [_IdleStep(self, index) for index in sorted(idle)]
        schedule(steps)
        self.weights.check_names(self.losses.names, self.metrics.names)
        loss, metrics = self.losses.close()
        if self.metrics.names:
            self.metrics.check_names(self.losses.names)
            metrics.update(self.metrics.close())
        num_samples = self.micro_batches[-1].rows.stop
        return WindowResult(loss, metrics, num_busy, num_samples, self.weights.total(self.losses.names))


class _BusyStep:
    """A micro-batch that weighs something."""

    __slots__ = ("_index", "_weighed", "_window")

    def __init__(self, window: OpenWindow, index: int) -> None:
        self._window = window
        self._index = index
        self._weighed: list[tuple[Tensor, float]] = []  # loss terms with their graph, and their parts of the window

    def forward(self) -> None:
        window = self._window
        output = window.loss_fn(window.model, window.take(self._index))
        if isinstance(output, tuple):
            output, metrics = read_pair(output)
            window.metrics.add(self._index, metrics)
        self._weighed = window.losses.add(self._index, output)

    def backward(self) -> None:
        weighed, self._weighed = self._weighed, []
        if weighed:
            self._window.back_propagate(weighed)


class _IdleStep:
    """A micro-batch that weighs nothing: looked at only where there are metrics to be had from it."""

    __slots__ = ("_index", "_window")

    def __init__(self, window: OpenWindow, index: int) -> None:
        self._window = window
        self._index = index

    def forward(self) -> None:
        window = self._window
        if window.metrics.names:
            with torch.no_grad():
                output = window.loss_fn(window.model, window.take(self._index))
            if isinstance(output, tuple):
                window.metrics.add(self._index, read_pair(output)[1])

    def backward(self) -> None:
        pass
