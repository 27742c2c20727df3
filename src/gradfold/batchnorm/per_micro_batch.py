"""BatchNorm by micro-batch: each has its own statistics, as in ghost batch norm (Hoffer et al. 2017, arXiv 1705.08741).

The running statistics advance once per window, by the window's own mean and unbiased variance, as with a whole batch.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from gradfold.batchnorm.moments import Moments, merge
from gradfold.batchnorm.policy import SHARDS_REFUSED, LayerHooks, batch_statistics_layers, layer_error
from gradfold.batchnorm.torch_private import BatchNorm
from gradfold.engine.strategy import Passes, Strategy
from gradfold.engine.window import Context
from gradfold.state.snapshot import Snapshot


@final
class PerMicroBatchNorm(Strategy):
    """One micro-batch after another, with running statistics advanced once, by those of the whole window."""

    shards_refused = SHARDS_REFUSED

    def run(self, window: Passes, indices: Sequence[int], snapshot: Snapshot) -> None:
        """Run the micro-batches in order."""
        statistics = WindowStatistics(batch_statistics_layers(window.context.model))
        snapshot.undo.append(statistics.close)
        with statistics:
            for index in indices:
                statistics.listen()
                weighed = window.forward(index)
                statistics.pause()
                window.backward(weighed)
            statistics.commit()

    def watching(self, context: Context) -> LayerHooks:
        """Refuses micro-batches of one value per channel."""
        layers = batch_statistics_layers(context.model)
        names = {layer: name for name, layer in layers.items()}
        return LayerHooks(layers, partial(_refuse_one_value, names), lambda *_: None)

    def is_sequential(self, context: Context) -> bool:
        """Where no layer normalizes by micro-batch."""
        return not self.depends_on_split(context)

    def depends_on_split(self, context: Context) -> bool:
        """Where a layer normalizes by micro-batch."""
        return bool(batch_statistics_layers(context.model))

    def split_dependent_layers(self, context: Context) -> Mapping[str, nn.Module] | None:
        """The layers that normalize by micro-batch; None where one has no running statistics to normalize by."""
        layers = batch_statistics_layers(context.model)
        return layers if all(getattr(one, "running_mean", None) is not None for one in layers.values()) else None


class WindowStatistics(LayerHooks):
    """Collects each layer's batch moments during a window and commits them to its running statistics once.

    With momentum 1 a layer's running statistics *are* the mean and unbiased variance of its last batch, at no cost, so
    hooks copy them away. A layer that a forward pass calls several times advances once per call, as with a whole batch.
    """

    def __init__(self, layers: Mapping[str, BatchNorm]) -> None:
        tracking = {name: layer for name, layer in layers.items() if layer.track_running_stats}
        super().__init__(tracking, self._before, self._after)
        self._records: dict[BatchNorm, _LayerStatistics] = {}
        self._num_calls: Counter[BatchNorm] | None = None  # of this forward pass; None outside of one

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for record in self._records.values() if any(error) else ():
            record.restore()

    def close(self) -> None:
        """Remove the hooks, and give the layers their momentum."""
        super().close()
        for record in self._records.values():
            record.layer.momentum = record.momentum

    def listen(self) -> None:
        """A forward pass begins."""
        self._num_calls = Counter()

    def pause(self) -> None:
        """The forward pass is over; layers that run again (activation checkpointing) add nothing."""
        self._num_calls = None

    def commit(self) -> None:
        """Advance the running statistics by the window's moments; BatchNormError where hooks have missed a layer."""
        self.refuse_unseen(
            self._records,
            "ran without calling its hooks (a compiled or scripted graph), so its statistics cannot be collected. Do "
            "not compile these layers, or put them into evaluation mode.",
        )
        for record in self._records.values():
            record.advance()

    def _before(self, layer: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Here rather than on entry, since a lazy layer has no statistics before its first call.
        _refuse_one_value(self.names, layer, args, kwargs)
        if layer not in self._records:
            self._records[layer] = _LayerStatistics(layer)
            layer.momentum = 1.0

    def _after(self, layer: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._num_calls is not None:
            self._records[layer].collect(self._num_calls[layer], _input(args, kwargs))
            self._num_calls[layer] += 1


def _refuse_one_value(
    names: Mapping[BatchNorm, str], layer: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise BatchNormError where a layer's input has no variance."""
    values = _input(args, kwargs)
    if values.dim() > 1 and values.numel() == values.shape[1]:
        raise layer_error(
            [names[layer]],
            f"got one value per channel (input {tuple(values.shape)}), which has no variance: a micro-batch of one "
            "row. Choose a micro_batch_size that leaves no part with a single row (3 splits 5 rows into 3 and 2, 2 "
            "splits them into 2, 2 and 1), or leave such a batch out.",
        )


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    values: Tensor = args[0] if args else kwargs["input"]
    return values


class _LayerStatistics:
    """One layer's moments in a window, and its state when the window opened."""

    def __init__(self, layer: BatchNorm) -> None:
        self.layer = layer
        self.momentum = layer.momentum
        self._before = [None if one is None else one.clone() for one in self._buffers()]
        self._calls: dict[int, list[Moments]] = defaultdict(list)  # n-th call of a forward pass -> micro-batches

    def collect(self, call: int, values: Tensor) -> None:
        """Copy the moments of an input (N, C) or (N, C, ...) that was just normalized."""
        mean, variance, _ = self._buffers()
        self._calls[call].append(Moments.of_unbiased(mean, variance, values.numel() // values.shape[1]))

    @torch.no_grad()
    def restore(self) -> None:
        """Set the running statistics to those at the opening of the window."""
        for now, before in zip(self._buffers(), self._before, strict=True):
            if before is not None:
                now.copy_(before)

    @torch.no_grad()
    def advance(self) -> None:
        """Move the running statistics from those at the opening, once per call, by the window's moments."""
        self.restore()
        mean, variance, counter = self._buffers()
        for parts in self._calls.values():
            window = merge(parts)
            if counter is not None:
                counter.add_(1)
            momentum: float | Tensor | None = self.momentum
            if momentum is None:  # the plain average over all batches so far
                momentum = 1.0 / counter.to(window.mean.dtype)
            window.advance(mean, variance, momentum)

    def _buffers(self) -> tuple[Any, Any, Any]:
        """Those of now, since a forward of the user's may have bound others."""
        return self.layer.running_mean, self.layer.running_var, self.layer.num_batches_tracked
