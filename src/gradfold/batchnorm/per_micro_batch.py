"""Batch normalization in a window of several micro-batches: refused, or by micro-batch knowingly.

In training mode BatchNorm normalizes by the mean and variance of what it is given, so a micro-batch of 16 rows is not
normalized as those rows are in a batch of 256, and the gradient differs. `"per_micro_batch"` accepts that (as "ghost
batch norm" does on purpose: Hoffer et al. 2017, arXiv 1705.08741) but keeps the running statistics those of the batch:
they advance once per window, by the window's own mean and unbiased variance.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from gradfold.engine.window import Backward, Forward, Schedule
from gradfold.errors import BatchNormError, OptionError

__all__: list[str] = []

BatchNormOption: TypeAlias = Literal["per_micro_batch", "exact"] | None


def check_option(batch_norm: str | None) -> None:
    """Raise OptionError unless the option is known."""
    if batch_norm not in (None, "per_micro_batch", "exact"):
        raise OptionError(f'batch_norm={batch_norm!r}; expected None, "exact" or "per_micro_batch".')


def schedule_for(
    model: nn.Module,
    modules: Iterable[nn.Module],
    batch_norm: BatchNormOption,
    num_micro_batches: int,
    num_rows: int,
    plain: Schedule,
) -> Schedule:
    """How to run a window of several micro-batches; `modules` are all those of the model, `plain` does without them.

    Raises:
        BatchNormError: layers would see a micro-batch instead of the batch, and nobody said that this is meant.
    """
    if not [module for module in modules if isinstance(module, _BatchNorm)]:
        return plain
    layers = batch_statistics_layers(model)
    if not layers:
        return plain
    if batch_norm is None:
        refuse(layers, num_micro_batches, num_rows)
    return PerMicroBatch(layers)


def batch_statistics_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that normalize by the statistics of what they are given, by name.

    SyncBatchNorm and subclasses are among them; layers in evaluation mode are not, unless they keep no statistics.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and (module.training or (module.running_mean is None and module.running_var is None))
    }


def refuse(layers: Mapping[str, nn.Module], num_micro_batches: int, num_rows: int) -> None:
    """Raise BatchNormError that names the layers."""
    names = ", ".join(list(layers)[:3]) + (", ..." if len(layers) > 3 else "")
    noun = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
    seen = f"{-(-num_rows // num_micro_batches)} rows at a time, not the {num_rows} of the batch"
    raise BatchNormError(
        f"BatchNorm in {noun} ({names}) would see {seen if num_rows else 'one micro-batch at a time, not the batch'}, "
        'so the gradient would not be that of the batch. Write batch_norm="exact" to normalize by the whole batch, '
        'batch_norm="per_micro_batch" to accept that, put the layers into evaluation mode (layer.eval()) to use their '
        "running statistics, or replace them by GroupNorm: gradfold.convert_batch_norm(model).",
        tuple(layers),
    )


class PerMicroBatch:
    """A schedule: one micro-batch after another, with the running statistics advanced once, by the whole window's."""

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._layers = layers

    def __call__(self, indices: Sequence[int], forward: Forward, backward: Backward) -> None:
        """Run the micro-batches in order."""
        with WindowStatistics(self._layers) as statistics:
            for index in indices:
                statistics.listen()
                weighed = forward(index)
                statistics.pause()
                backward(weighed)
            statistics.commit()


@dataclass(frozen=True, slots=True)
class _BatchMoments:
    """Mean and unbiased variance per channel, of `count` values each."""

    mean: Tensor  # (C,)
    variance: Tensor  # (C,)
    count: int


@dataclass
class _Record:
    """What one layer has told in a window, and what it must be set back to."""

    layer: _BatchNorm
    momentum: float | None
    tracked: Tensor | None  # num_batches_tracked when the window opened
    mean: Tensor  # running_mean when the window opened
    variance: Tensor  # running_var when the window opened
    calls: dict[int, list[_BatchMoments]] = field(
        default_factory=lambda: defaultdict(list)
    )  # n-th call -> micro-batches
    num_calls: int = 0  # in the micro-batch being run


class WindowStatistics:
    """Collects each layer's batch moments during a window and commits them to its running statistics once.

    With momentum 1 a layer's running statistics *are* the mean and unbiased variance of its last batch, computed by
    the kernel that normalizes, at no further cost. So during the window the momentum is 1, and hooks copy the moments
    away. A layer that is called several times in a forward pass advances once per call, as in the full batch.
    """

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._layers = {name: layer for name, layer in layers.items() if layer.track_running_stats}
        self._records: dict[_BatchNorm, _Record] = {}
        self._handles: list[RemovableHandle] = []
        self._versions: dict[str, int] = {}
        self._listening = False

    def __enter__(self) -> WindowStatistics:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(layer.register_forward_hook(self._after, with_kwargs=True))
            self._versions[name] = _version(layer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for record in self._records.values():
            record.layer.momentum = record.momentum
        if error is not None:
            for record in self._records.values():
                _reset(record)

    def listen(self) -> None:
        """A forward pass begins."""
        self._listening = True
        for record in self._records.values():
            record.num_calls = 0

    def pause(self) -> None:
        """The forward pass is over; layers that run again (activation checkpointing) tell nothing new."""
        self._listening = False

    @torch.no_grad()
    def commit(self) -> None:
        """Advance the running statistics by the window's moments.

        Raises:
            BatchNormError: a layer ran where hooks are not called (a graph compiled or scripted before).
        """
        heard = {id(layer) for layer in self._records}
        deaf = [
            name
            for name, layer in self._layers.items()
            if id(layer) not in heard and _version(layer) != self._versions[name]
        ]
        if deaf:
            raise BatchNormError(
                f"BatchNorm in {', '.join(deaf[:3])} ran without calling its hooks (a compiled or scripted graph), so "
                "its statistics cannot be collected. Leave these layers uncompiled, or put them into evaluation mode.",
                tuple(deaf),
            )
        for record in self._records.values():
            _advance(record)

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Here rather than on entry, since a lazy layer has no statistics before its first call.
        assert isinstance(layer, _BatchNorm)
        self._refuse_single_value(layer, args[0] if args else kwargs["input"])
        if layer not in self._records:
            assert layer.running_mean is not None and layer.running_var is not None
            tracked = layer.num_batches_tracked
            self._records[layer] = _Record(
                layer,
                layer.momentum,
                None if tracked is None else tracked.clone(),
                layer.running_mean.clone(),
                layer.running_var.clone(),
            )
            layer.momentum = 1.0

    def _refuse_single_value(self, layer: _BatchNorm, values: Tensor) -> None:
        if values.dim() > 1 and values.numel() == values.shape[1]:
            name = next(name for name, known in self._layers.items() if known is layer)
            raise BatchNormError(
                f"BatchNorm in {name} got one value per channel (input {tuple(values.shape)}), which has no variance: "
                "a micro-batch of one row. Choose a micro_batch_size that leaves no part with a single row (3 cuts 5 "
                "rows into 3 and 2, 2 cuts them into 2, 2 and 1), or leave such a batch out.",
                (name,),
            )

    def _after(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert isinstance(layer, _BatchNorm)
        if not self._listening:
            return
        record = self._records[layer]
        values = args[0] if args else kwargs["input"]  # (N, C) or (N, C, ...)
        assert layer.running_mean is not None and layer.running_var is not None
        record.calls[record.num_calls].append(
            _BatchMoments(layer.running_mean.clone(), layer.running_var.clone(), values.numel() // values.shape[1])
        )
        record.num_calls += 1


@torch.no_grad()
def _reset(record: _Record) -> None:
    """Set a layer's statistics to those at the opening of the window."""
    layer = record.layer
    assert layer.running_mean is not None and layer.running_var is not None
    layer.running_mean.copy_(record.mean)
    layer.running_var.copy_(record.variance)
    if record.tracked is not None:
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked.copy_(record.tracked)


def _advance(record: _Record) -> None:
    """Set a layer's statistics to those at the opening, moved once per call by the window's moments."""
    _reset(record)
    layer = record.layer
    assert layer.running_mean is not None and layer.running_var is not None
    for moments in record.calls.values():
        window = _merge(moments)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
        momentum: float | Tensor | None = record.momentum
        if momentum is None:  # the plain average over all batches so far
            assert layer.num_batches_tracked is not None
            momentum = 1.0 / layer.num_batches_tracked.to(window.mean.dtype)
        layer.running_mean.mul_(1 - momentum).add_(window.mean * momentum)
        layer.running_var.mul_(1 - momentum).add_(window.variance * momentum)


def _merge(parts: Sequence[_BatchMoments]) -> _BatchMoments:
    """The moments of several parts together: Chan, Golub and LeVeque 1983, eq. 2.1, stable for any mean.

    Sums of squared differences are added up, never squares: E[x^2] - E[x]^2 cancels where the mean is large.
    """
    count = sum(part.count for part in parts)
    reference = parts[0].mean
    mean, squares = reference.clone(), torch.zeros_like(reference)
    for part in parts:
        mean += (part.mean - reference) * (part.count / count)
    for part in parts:
        squares += part.variance * (part.count - 1) + (part.mean - mean).square() * part.count
    return _BatchMoments(mean, squares / (count - 1), count)


def _version(layer: _BatchNorm) -> int:
    tracked = layer.num_batches_tracked
    return 0 if tracked is None else tracked._version
