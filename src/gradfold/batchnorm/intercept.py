"""Intercepted calls of batch_norm, and the check that no BatchNorm of a window escapes.

`BatchNormMode` sees the calls that Python makes, and lets torch's own layers count in the first micro-batch alone.
`LayerTracker` sees the layers: calls that C++ makes (TorchScript) do not reach the mode, and a custom forward may count
in any way (`self.num_batches_tracked = self.num_batches_tracked + 1`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradfold.batchnorm.policy import LayerHooks, layer_error
from gradfold.batchnorm.torch_private import BATCH_NORM_FORWARDS, BatchNorm, TorchFunctionMode
from gradfold.errors import BatchNormError

FUNCTIONAL = "a functional batch_norm"  # the layer's name in messages where there is no layer


@dataclass(frozen=True)
class BatchNormCall:
    """The arguments of `F.batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def with_frozen_statistics(self) -> Tensor:
        """The result by running statistics, or else by mean 0 and variance 1, which make no sample depend on others."""
        mean, variance = self.running_mean, self.running_var
        if mean is None or variance is None:
            dtype = torch.promote_types(self.input.dtype, torch.float32)
            mean = self.input.new_zeros(self.input.shape[1], dtype=dtype)
            variance = mean + 1
        return F.batch_norm(self.input, mean, variance, self.weight, self.bias, False, self.momentum, self.eps)


_UNSUPPORTED = frozenset({torch.native_batch_norm, torch.cudnn_batch_norm, torch.batch_norm_stats})
_INCREMENTS = frozenset({Tensor.add_, Tensor.__iadd__})
_COUNTING_CODE = frozenset(forward.__code__ for forward in BATCH_NORM_FORWARDS)

# The order of arguments of torch.batch_norm, which is not that of F.batch_norm.
_OF_TORCH = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")


def _read_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BatchNormCall | None:
    # F.batch_norm arrives as itself and then runs with the mode off, so torch.batch_norm alone would not be enough.
    if func is torch.batch_norm:
        func, args, kwargs = F.batch_norm, (), dict(zip(_OF_TORCH, args, strict=False)) | kwargs
        kwargs.pop("cudnn_enabled", None)
    return BatchNormCall(*args, **kwargs) if func is F.batch_norm else None


class BatchNormMode(TorchFunctionMode):
    """Replaces the results of calls of batch_norm.

    Args:
        result_of: what a call returns in a layer of this name; None: what torch makes of it.
        is_counting: whether layers count a batch, in this model or outside of it.
    """

    def __init__(self, result_of: Callable[[BatchNormCall, str], Tensor | None], is_counting: bool = True) -> None:
        super().__init__()
        self._result_of = result_of
        self._is_counting = is_counting
        self.layer, self.is_intercepted = FUNCTIONAL, False  # where the forward pass is, and whether a call was seen
        self._counted: list[Tensor] = []

    @torch.no_grad()
    def uncount(self) -> None:
        """Set the counters of all layers back, in this model or outside of it."""
        while self._counted:
            self._counted.pop().sub_(1)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        call = _read_call(func, args, kwargs)
        if call is not None:
            result = self._result_of(call, self.layer)
            if result is not None:
                self.is_intercepted = True
                return result
        elif func in _UNSUPPORTED:
            raise BatchNormError(
                f"torch.{func.__name__} in loss_fn is not supported. Call torch.nn.functional.batch_norm.", ()
            )
        elif func in _INCREMENTS and sys._getframe(1).f_code in _COUNTING_CODE:
            if not self._is_counting:
                return args[0]
            self._counted.append(args[0])
        return func(*args, **kwargs)


current_forward: ContextVar[BatchNormMode | None] = ContextVar("current_forward", default=None)
"""The mode of the micro-batch that runs; None outside of a window's forward passes."""


class LayerTracker(LayerHooks):
    """Knows which layer a forward pass is in, and whether it was intercepted; counts a batch once."""

    def __init__(self, layers: Mapping[str, BatchNorm]) -> None:
        super().__init__(layers, self._before, self._after)
        self._seen: set[nn.Module] = set()
        self._kept: list[tuple[BatchNorm, Tensor, Tensor]] = []

    def check(self) -> None:
        """Raise BatchNormError where a layer has run without its hooks; one that has not run at all is fine."""
        self.refuse_unseen(self._seen, _not_intercepted())

    @torch.no_grad()
    def count_once(self, is_first: bool) -> None:
        """Keep counters of custom forwards in a turn of the first micro-batch, and restore them after others."""
        if is_first:
            custom = [layer for layer in self.names if type(layer).forward not in BATCH_NORM_FORWARDS]
            found = [(layer, layer._buffers.get("num_batches_tracked")) for layer in custom]
            self._kept = [(layer, counter, counter.clone()) for layer, counter in found if counter is not None]
            return
        for layer, counter, value in self._kept:
            layer._buffers["num_batches_tracked"] = counter
            counter.copy_(value)

    def _before(self, layer: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = current_forward.get()
        self._seen.add(layer)
        if forward is None:  # the backward pass runs it
            raise checkpoint_error(self.names[layer])
        forward.layer, forward.is_intercepted = self.names[layer], False

    def _after(self, layer: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward = current_forward.get()
        if forward is None:
            return
        if not forward.is_intercepted and layer.training and isinstance(output, Tensor):
            raise layer_error([forward.layer], _not_intercepted())
        forward.layer = FUNCTIONAL


def checkpoint_error(name: str) -> BatchNormError:
    """The error that names a layer inside an activation checkpoint."""
    return layer_error(
        [name],
        "runs inside an activation checkpoint (torch.utils.checkpoint), which would run it again for one micro-batch "
        'alone. With batch_norm="exact" what micro-batches save is kept in host memory anyway: leave the checkpoint '
        "out, or put it around parts without BatchNorm.",
    )


def refuse_scripted(model: nn.Module) -> None:
    """Raise BatchNormError where a scripted module normalizes by batch, which cannot be intercepted."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and module.training:
            with suppress(RuntimeError):  # it has no forward
                if "batch_norm" in str(module.inlined_graph):
                    raise layer_error([name], _not_intercepted("it is scripted (torch.jit)"))


def _not_intercepted(cause: str = "TorchScript, torch.export or a custom kernel") -> str:
    return (
        f'could not be intercepted: {cause}. It would normalize by micro-batch. With batch_norm="exact" use an '
        "ordinary nn.BatchNorm layer there, or put it into evaluation mode."
    )
