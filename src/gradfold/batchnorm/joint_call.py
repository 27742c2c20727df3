r"""A joint call: one call of BatchNorm by all micro-batches of a window, whose statistics are those of all their rows.

The mathematics is SyncBatchNorm's, over micro-batches (and ranks) instead of devices. For N values per channel,

    y  = w xhat + b,    xhat = (x - mean) / sqrt(var + eps)
    dx = w / sqrt(var + eps) (dy - sum(dy) / N - xhat sum(dy xhat) / N),    dw = sum(dy xhat),    db = sum(dy)

with mean, var and both sums over the whole window. In the autograd graph it is three functions:

    x[k] -> Gather -> \                       / -> Normalize -> y[k]
                       > --- Synchronize --- <
    x[j] -> Gather -> /                       \ -> Normalize -> y[j]

    forward     Normalize makes y[k] when micro-batch k goes on
    backward    Normalize adds to the sums, Synchronize completes them, Gather makes dx[k]

since Synchronize alone would need y, dy and dx of all micro-batches at once, where these need them of one. It also
passes a token to the next joint call, which fixes the order of joint calls in the backward pass of all ranks.

Sources: Ioffe and Szegedy 2015, arXiv 1502.03167; `torch.nn.SyncBatchNorm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradfold.batchnorm.coordinator import SynchronizedCoordinator
from gradfold.batchnorm.intercept import BatchNormCall
from gradfold.batchnorm.moments import Moments
from gradfold.errors import BatchNormError


class JointCall:
    """What all micro-batches need of one joint call; `call` is the first's, whose weight, bias and eps all have."""

    def __init__(self, name: str, moments: Moments, call: BatchNormCall, group: SynchronizedCoordinator | None) -> None:
        self.is_backward_allowed = False  # until the backward pass of the window begins
        # In the dtype of the moments, float32 at least: kernels take all of a layer's tensors in one dtype.
        dtype, affine = moments.mean.dtype, (call.weight, call.bias)
        self.scale, self.shift = (None if one is None else one.detach().to(dtype) for one in affine)
        self.sums = moments.mean.new_zeros(2, len(moments.mean))  # of dy xhat and of dy, over this rank
        self.correction: tuple[Tensor, Tensor] | None = None  # scale and shift that give dx through the statistics
        self._name = name
        self._moments = moments
        self._eps = call.eps
        self._group = group

    def finish_sums(self) -> None:
        """All micro-batches have added theirs."""
        if not self.is_backward_allowed:
            raise BatchNormError(
                f"loss_fn differentiates through BatchNorm in {self._name} (torch.autograd.grad, a gradient penalty), "
                'which is not supported with batch_norm="exact": it needs the whole batch first. Leave the penalty '
                "out, or use GroupNorm: gradfold.convert_batch_norm(model).",
                (self._name,),
            )
        weight, bias = self.sums if self._group is None else self._group.sum(self.sums)
        inverse = torch.rsqrt(self._moments.variance + self._eps)
        factor = (inverse if self.scale is None else inverse * self.scale) / -self._moments.count
        self.correction = factor * weight, factor * bias

    def affine(self, values: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        """Values of a micro-batch by the statistics of all, scaled and shifted."""
        if not values.numel():
            return values.clone()
        mean, variance = self._moments.mean, self._moments.variance
        out: Tensor = torch.native_batch_norm(values, scale, shift, mean, variance, False, 0.0, self._eps)[0]
        return out

    def backward(self, values: Tensor, gradient: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        """Those wanted of dx with constant statistics, dw and db of a micro-batch."""
        mean, variance = self._moments.mean, self._moments.variance
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
            gradient, values, self.scale, mean, variance, None, None, False, self._eps, wanted
        )
        return found


class Gather(torch.autograd.Function):
    """The entrance of one micro-batch."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, call: JointCall) -> Tensor:
        """The same values."""
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.save_for_backward(values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor, None]:
        """The gradient, through the statistics as well."""
        call, (values,) = ctx.call, ctx.saved_tensors
        through_statistics: Tensor = call.affine(values, *call.correction)
        if gradient is None or not values.numel():
            return through_statistics, None
        own, _, _ = call.backward(values, gradient, [True, False, False])
        return own.add_(through_statistics), None


class Synchronize(torch.autograd.Function):
    """The one function with all micro-batches, from the entrances to the exits; passes the token on."""

    @staticmethod
    def forward(
        ctx: Any, call: JointCall, token: Tensor, scale: Tensor | None, shift: Tensor | None, *gathered: Tensor
    ) -> tuple[Tensor, ...]:
        """The same values."""
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.dtypes = [None if one is None else one.dtype for one in (scale, shift)]
        if not any(ctx.needs_input_grad[2:]):  # frozen so far: the token alone has a graph
            ctx.mark_non_differentiable(*gathered)
        return (token.clone(), *gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients unchanged; the sums over this rank are those of scale and shift."""
        ctx.call.finish_sums()
        own = [None if dtype is None else one.to(dtype) for one, dtype in zip(ctx.call.sums, ctx.dtypes, strict=True)]
        return (None, None, *own, *gradients)


class Normalize(torch.autograd.Function):
    """The exit of one micro-batch."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, call: JointCall) -> Tensor:
        """The micro-batch, normalized."""
        ctx.call = call
        ctx.save_for_backward(values)
        return call.affine(values, call.scale, call.shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Add to the sums, and pass the gradient on unchanged."""
        (values,) = ctx.saved_tensors
        if values.numel():
            _, *own = ctx.call.backward(values, gradient, [False, True, True])
            ctx.call.sums += torch.stack(own)
        return gradient, None
