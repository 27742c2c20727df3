"""An interception: function modes that see calls of batch_norm, whether a module makes them or a function.

Under a mode `F.batch_norm` arrives as itself and then runs with the mode off, so that `torch.batch_norm` alone would
never be seen. What C++ calls by itself, as TorchScript does, is not seen at all.

Source: `torch.overrides.TorchFunctionMode`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from gradfold.errors import BatchNormError

__all__: list[str] = []


@dataclass(frozen=True)
class BatchNormCall:
    """The arguments of a call of batch_norm."""

    values: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    is_training: bool
    momentum: float
    eps: float


def _of_functional(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> BatchNormCall:
    return BatchNormCall(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _of_torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> BatchNormCall:
    return BatchNormCall(input, running_mean, running_var, weight, bias, training, momentum, eps)


_READERS: dict[Any, Callable[..., BatchNormCall]] = {
    F.batch_norm: _of_functional,
    torch.batch_norm: _of_torch,
}
_UNREAD = frozenset({torch.native_batch_norm, torch.cudnn_batch_norm, torch.batch_norm_stats})
_COUNTS = frozenset({Tensor.add_, Tensor.__iadd__})
_COUNTERS = frozenset({_BatchNorm.forward.__code__, nn.SyncBatchNorm.forward.__code__})


def normalises_by_batch(call: BatchNormCall) -> bool:
    """Whether its statistics are those of what it is given."""
    return call.is_training


class Interception(TorchFunctionMode):
    """Hands calls of batch_norm that normalise by the statistics of the batch to a function.

    Args:
        on_call: gets the call, and gives what is returned instead.
        counts: whether layers count a batch, in this model or outside of it.
        concerns: which calls to hand over.
    """

    def __init__(
        self,
        on_call: Callable[[BatchNormCall], Any],
        counts: bool = True,
        concerns: Callable[[BatchNormCall], bool] = normalises_by_batch,
    ) -> None:
        super().__init__()
        self._on_call = on_call
        self._counts = counts
        self._concerns = concerns
        self._counted: list[Tensor] = []

    @torch.no_grad()
    def count_back(self) -> None:
        """As if no layer had counted, in this model or outside of it."""
        while self._counted:
            self._counted.pop().sub_(1)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        reader = _READERS.get(func)
        if reader is not None:
            call = reader(*args, **kwargs)
            if self._concerns(call):
                return self._on_call(call)
        elif func in _UNREAD:
            raise BatchNormError(
                f"loss_fn calls torch.{func.__name__}, which gradfold does not follow. Call "
                "torch.nn.functional.batch_norm.",
                (),
            )
        elif func in _COUNTS and sys._getframe(1).f_code in _COUNTERS:
            if not self._counts:
                return args[0]
            self._counted.append(args[0])
        return func(*args, **kwargs)


def by_fixed_statistics(call: BatchNormCall) -> Tensor:
    """What the call would give with its running statistics, or else 0 and 1, which couple no rows."""
    mean, variance = call.running_mean, call.running_var
    if mean is None or variance is None:
        channels = call.values.new_zeros(
            call.values.shape[1], dtype=torch.promote_types(call.values.dtype, torch.float32)
        )
        mean, variance = channels, channels + 1
    return F.batch_norm(call.values, mean, variance, call.scale, call.shift, False, call.momentum, call.eps)
