"""A backward pass: loss terms, each with its normalized weight, through torch or a framework's own call.

The weight enters as `grad_output`, a tensor like the loss: `loss.backward(gradient=grad_output)` gives the gradient of
`weight * loss` and adds nothing to the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from gradfold.errors import BackwardError, LossError
from gradfold.messages import warn
from gradfold.torch_private import run_backward

Weighed: TypeAlias = "Sequence[tuple[Tensor, float | Tensor]]"
"""Loss terms, each with its normalized weight; empty where all weights are 0. Or tensors of any shape, each with its
cached gradient, from a loss that was back-propagated before."""


class BackwardFn(Protocol):
    """A framework's replacement of `loss.backward`: `accelerator.backward`, `fabric.backward`, ..."""

    def __call__(self, loss: Tensor, /, *, gradient: Tensor) -> object:
        """Back-propagate `gradient`, the grad_output, from `loss`."""


class BackPropagation:
    """Back-propagates weighted loss terms, by `backward` in place of torch's own function where it is given."""

    def __init__(self, backward: BackwardFn | None = None, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        self._backward = backward
        self._grad_scaler = grad_scaler

    def __call__(self, terms: Weighed, factor: float = 1.0) -> None:
        """Back-propagate the sum of `factor * weight * term`; LossError where no term requires grad."""
        if len(terms) == 1 and self._backward is None:
            ((loss, weight),) = terms
            if type(loss) is Tensor and loss.requires_grad and type(weight) is float:  # the usual case, faster
                grad_output = self._grad_output(loss, weight * factor)
                run_backward((loss,), (grad_output,), False, False, (), allow_unreachable=True, accumulate_grad=True)
                return
        if not terms:
            return
        losses = [term for term, _ in terms if term.requires_grad]
        # What has arrived from a loss before is scaled already.
        grad_outputs = [
            weight if isinstance(weight, Tensor) else self._grad_output(term, weight * factor)
            for term, weight in terms
            if term.requires_grad
        ]
        if not losses:
            raise LossError(
                "the loss does not require grad: nothing connects it to the model's parameters. Look for "
                "torch.no_grad(), .detach(), .item() or an argmax on the way, and for frozen parameters."
            )
        if self._backward is None:
            torch.autograd.backward(losses, grad_outputs)
        elif len(losses) == 1 and losses[0].dim() == 0:
            self._backward(losses[0], gradient=grad_outputs[0])
        else:  # a framework takes one loss
            loss = torch.stack([(term * given).sum() for term, given in zip(losses, grad_outputs, strict=True)]).sum()
            self._backward(loss, gradient=torch.ones_like(loss))

    def _grad_output(self, loss: Tensor, weight: float) -> Tensor:
        # A new one each time: where a parameter of one element is viewed on its way to the loss, autograd makes this
        # memory its .grad, and the next micro-batch would add to both. A hook may write to it, too.
        if loss.dtype.itemsize < 4 and torch.tensor(weight, dtype=loss.dtype).item() != weight:
            # Python shows a warning once per place, which is what is wanted here.
            warn(
                f"the loss is {loss.dtype}, so the weight of a micro-batch is rounded to it (by up to 2e-3 in "
                "bfloat16). Let loss_fn take the mean in float32: losses.float().mean().",
            )
        grad_output = loss.new_full((), weight)
        if self._grad_scaler is None:
            return grad_output
        # The scale is on the device, and float32; in a float16 loss a scale of 65536 is infinite, as without gradfold,
        # and the scaler backs off.
        scaled: Tensor = self._grad_scaler.scale(grad_output)
        return scaled.to(loss.dtype)


def probe(backward: BackwardFn, device: torch.device) -> None:
    """Raise BackwardError unless `backward` leaves the scale of gradients alone, seen on one scalar.

    Frameworks that count micro-batches themselves divide by their number, a second time.
    """
    scalar = torch.ones((), device=device, requires_grad=True)
    try:
        inspect.signature(backward).bind(scalar, gradient=scalar)
    except ValueError:  # a builtin without a signature
        pass
    except TypeError as error:
        raise BackwardError(
            f"backward= cannot be called as backward(loss, gradient=gradient): {error}. The weight of a micro-batch is "
            "the gradient argument; pass it on: loss.backward(gradient=gradient).",
            0.0,
        ) from None
    with torch.enable_grad():
        backward(scalar * 1.0, gradient=torch.full((), 3.0, device=device))
    if scalar.grad is None:
        raise BackwardError("backward= did not back-propagate: a scalar got no gradient. It must run that pass.", 0.0)
    if scalar.grad.item() == 1.0:
        raise BackwardError(
            "backward= ignores its gradient argument, which is the weight of a micro-batch. Pass it on: "
            "loss.backward(gradient=gradient).",
            1 / 3,
        )
    factor = scalar.grad.item() / 3.0
    if factor != 1.0:
        raise BackwardError(
            f"backward= multiplies gradients by {factor:g}, on top of gradfold's own weights. If it counts "
            "micro-batches itself, set its number to 1 (Accelerator(gradient_accumulation_steps=1)); loss scaling "
            "through backward= is not supported by this version.",
            factor,
        )
