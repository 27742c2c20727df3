r"""A joint call: one call of BatchNorm by all micro-batches of a window, whose statistics are those of all their rows.

The mathematics is SyncBatchNorm's, over micro-batches (and ranks) in the place of devices. For N values per channel,

    y  = w xhat + b,    xhat = (x - mean) / sqrt(var + eps)
    dx = w / sqrt(var + eps) (dy - sum(dy) / N - xhat sum(dy xhat) / N),    dw = sum(dy xhat),    db = sum(dy)

with mean, var and both sums over the whole window. In the autograd graph it is one function with an entrance and an
exit for every micro-batch:

    x[k] -> Entrance -> \                / -> Exit -> y[k]        forward: Exit makes y[k] when micro-batch k goes on
                         > --- Join --- <
    x[j] -> Entrance -> /                \ -> Exit -> y[j]        backward: Exit sums, Join adds up, Entrance makes dx

since Join alone would need y, dy and dx of all micro-batches at once, where this needs them of one. Join also passes a
token to the next joint call, which fixes the order of joint calls in the backward pass: ranks meet in each.

Sources: Ioffe and Szegedy 2015, arXiv 1502.03167; `torch.nn.SyncBatchNorm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradfold.batchnorm.moments import Moments
from gradfold.errors import BatchNormError

__all__: list[str] = []

Sums = tuple[Tensor, Tensor]
"""Per channel: the sums of dy xhat and of dy."""


class JointCall:
    """What the micro-batches of one joint call share.

    Args:
        name: of the layer.
        moments: of all values, on all ranks.
        scale: the layer's weight, detached.
        shift: its bias.
        eps: as the layer has it.
        sum_over_ranks: of the sums in the backward pass.

    Attributes:
        may_go_back: whether the backward pass of the window has begun.
    """

    def __init__(
        self,
        name: str,
        moments: Moments,
        scale: Tensor | None,
        shift: Tensor | None,
        eps: float,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        self.name = name
        self.moments = moments
        self.eps = eps
        self.may_go_back = False
        self._scale = scale
        self._shift = shift
        self._sum_over_ranks = sum_over_ranks
        self._parts: list[Sums] = []
        self._correction: Sums | None = None

    def normalize(self, values: Tensor) -> Tensor:
        """A micro-batch, by the statistics of all."""
        return self._affine(values, self._scale, self._shift)

    def add_sums(self, values: Tensor, gradient: Tensor) -> None:
        """Take what one micro-batch has to add."""
        if values.numel():
            _, weight, bias = self._backward(values, gradient, [False, True, True])
            self._parts.append((weight, bias))

    def close_sums(self) -> Sums:
        """All micro-batches have added theirs: the sums over those of this rank."""
        if not self.may_go_back:
            raise BatchNormError(
                f"loss_fn differentiates through BatchNorm in {self.name} (torch.autograd.grad, a gradient penalty), "
                'which batch_norm="exact" cannot do before the whole batch is through. Leave the penalty out, or use '
                "GroupNorm: gradfold.convert_batch_norm(model).",
                (self.name,),
            )
        zeros = torch.zeros_like(self.moments.mean)
        own = torch.stack([sum((part[which] for part in self._parts), zeros) for which in (0, 1)])
        self._parts = []
        weight, bias = self._sum_over_ranks(own)
        inverse = torch.rsqrt(self.moments.variance + self.eps)
        factor = (inverse if self._scale is None else inverse * self._scale) / -self.moments.count
        self._correction = factor * weight, factor * bias
        return own[0], own[1]

    def differentiate(self, values: Tensor, gradient: Tensor | None) -> Tensor:
        """The gradient of a micro-batch's values, given that of what was made of them."""
        assert self._correction is not None
        if not values.numel():
            return torch.zeros_like(values)
        through_statistics = self._affine(values, *self._correction)
        if gradient is None:
            return through_statistics
        own, _, _ = self._backward(values, gradient, [True, False, False])
        return own.add_(through_statistics)

    def _affine(self, values: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        if not values.numel():
            return values.clone()
        mean, variance = self.moments.mean, self.moments.variance
        out: Tensor = torch.native_batch_norm(
            values, self._as_moments(scale), self._as_moments(shift), mean, variance, False, 0.0, self.eps
        )[0]
        return out

    def _as_moments(self, one: Tensor | None) -> Tensor | None:
        """In the dtype of the moments, float32 at least: kernels take all of a layer's in one dtype."""
        return None if one is None else one.to(self.moments.mean.dtype)

    def _backward(self, values: Tensor, gradient: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = self.moments.mean, self.moments.variance
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
            gradient, values, self._as_moments(self._scale), mean, variance, None, None, False, self.eps, wanted
        )
        return found


@dataclass
class CallHandle:
    """A micro-batch's place in a joint call, which it has before the call is there."""

    call: JointCall | None = None

    @property
    def joined(self) -> JointCall:
        """The call, once all have come."""
        assert self.call is not None
        return self.call


class Gather(torch.autograd.Function):
    """Where a micro-batch comes in."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: CallHandle) -> Tensor:
        """The same values."""
        ctx.set_materialize_grads(False)
        ctx.place = place
        ctx.save_for_backward(values)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor, None]:
        """The gradient, with what goes through the statistics."""
        (values,) = ctx.saved_tensors
        return ctx.place.joined.differentiate(values, gradient), None


class Synchronize(torch.autograd.Function):
    """Where all micro-batches are together; inputs and outputs: token, entrances; in between, scale and shift."""

    @staticmethod
    def forward(
        ctx: Any, call: JointCall, token: Tensor, scale: Tensor | None, shift: Tensor | None, *entered: Tensor
    ) -> tuple[Tensor, ...]:
        """The same values."""
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.dtypes = [None if one is None else one.dtype for one in (scale, shift)]
        if not any(ctx.needs_input_grad[2:]):  # frozen so far: the token alone has a graph
            ctx.mark_non_differentiable(*entered)
        return (token.clone(), *entered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """What the exits handed on; the sums over this rank are the gradients of scale and shift."""
        sums = ctx.call.close_sums()
        own = [None if dtype is None else one.to(dtype) for one, dtype in zip(sums, ctx.dtypes, strict=True)]
        return (None, None, *own, *gradients)


class Normalize(torch.autograd.Function):
    """Where a micro-batch goes on."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: CallHandle) -> Tensor:
        """The micro-batch, normalized."""
        ctx.place = place
        ctx.save_for_backward(values)
        return place.joined.normalize(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Add to the sums, and hand the gradient on as it is."""
        (values,) = ctx.saved_tensors
        ctx.place.joined.add_sums(values, gradient)
        return gradient, None


def join(
    call: JointCall, token: Tensor, scale: Tensor | None, shift: Tensor | None, entered: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The token for the next joint call, and what goes on to the exits."""
    token, *together = Synchronize.apply(call, token, scale, shift, *entered)  # type: ignore[no-untyped-call]
    return token, together
