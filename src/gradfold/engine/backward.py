"""A trial: forward and backward passes that leave no trace.

Whatever a trial changes is as before when it ends: `.grad` of every tensor that it reached (but for those outside the
model behind a reentrant checkpoint, whose graph hides them), buffers, plain attributes of modules, and torch's, numpy's
and Python's random states.

A backward pass: loss terms, each with its share of the window as the seed, through torch or a framework's own call.

A seed is a tensor like the loss that holds its share: `loss.backward(gradient=seed)` gives the gradient of
`share * loss` and adds nothing to the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward

from gradfold.errors import BackwardError, LossError
from gradfold.messages import warn

__all__: list[str] = []


Weighed: TypeAlias = "Sequence[tuple[Tensor, float | Tensor]]"
"""Loss terms, each with its share of the window; none where nothing weighs anything. Or tensors of any shape, each with
the gradient that has arrived at it from a loss that was back-propagated before."""


class BackwardFn(Protocol):
    """What a framework wants called instead of `loss.backward`: `accelerator.backward`, `fabric.backward`, ..."""

    def __call__(self, loss: Tensor, /, *, gradient: Tensor) -> object:
        """Back-propagate `gradient`, the seed, from `loss`."""


class BackPropagation:
    """Seeds loss terms and back-propagates them.

    Args:
        backward: what to call instead of torch's own.
        grad_scaler: scales the seeds.

    Attributes:
        factor: by which seeds are multiplied, to undo a division by the number of ranks.
    """

    def __init__(self, backward: BackwardFn | None = None, grad_scaler: torch.amp.GradScaler | None = None) -> None:
        self._backward = backward
        self.factor = 1.0
        self._seed = _seed if grad_scaler is None else partial(_scaled_seed, grad_scaler)

    def __call__(self, terms: Weighed) -> None:
        """Back-propagate the sum of `share * term`.

        Raises:
            LossError: there are terms, and none requires grad.
        """
        if len(terms) == 1 and self._backward is None:
            ((loss, share),) = terms
            if type(loss) is Tensor and loss.requires_grad and type(share) is float:  # the usual case, faster
                # What torch.autograd.backward does once it has looked at its arguments, which takes it as long as a
                # small layer: with the plain loss and seed that stand here there is nothing to look for.
                _engine_run_backward(
                    (loss,),
                    (self._seed(loss, share * self.factor),),
                    False,
                    False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
                return
        if not terms:
            return
        losses = [term for term, _ in terms if term.requires_grad]
        seeds = [self._seed_of(term, share) for term, share in terms if term.requires_grad]
        if not losses:
            raise LossError(
                "the loss does not require grad: nothing connects it to the model's parameters. Look for "
                "torch.no_grad(), .detach(), .item() or an argmax on the way, and for frozen parameters."
            )
        if self._backward is None:
            torch.autograd.backward(losses, seeds)
        elif len(losses) == 1 and losses[0].dim() == 0:
            self._backward(losses[0], gradient=seeds[0])
        else:  # a framework takes one loss
            loss = torch.stack([(term * seed).sum() for term, seed in zip(losses, seeds, strict=True)]).sum()
            self._backward(loss, gradient=torch.ones_like(loss))

    def _seed_of(self, term: Tensor, share: float | Tensor) -> Tensor:
        # What has arrived is scaled already.
        return share if isinstance(share, Tensor) else self._seed(term, share * self.factor)


def _seed(loss: Tensor, share: float) -> Tensor:
    # A new one each time: where a parameter of one element is viewed on its way to the loss, autograd makes the seed's
    # memory its .grad, and the next micro-batch would add to both. A hook may write to it, too.
    if loss.dtype.itemsize < 4 and torch.tensor(share, dtype=loss.dtype).item() != share:
        _warn_of_rounding(loss.dtype)
    return loss.new_full((), share)


def _scaled_seed(grad_scaler: torch.amp.GradScaler, loss: Tensor, share: float) -> Tensor:
    # The scale is on the device, and float32; in a float16 loss a scale of 65536 is infinite, as without gradfold, and
    # the scaler backs off.
    scaled: Tensor = grad_scaler.scale(_seed(loss, share))
    return scaled.to(loss.dtype)


def probe(backward: BackwardFn, device: torch.device) -> None:
    """Raise BackwardError unless `backward` leaves the scale of gradients alone, seen on one scalar.

    Frameworks that count micro-batches themselves divide by their number, a second time.
    """
    scalar = torch.ones((), device=device, requires_grad=True)
    _check_signature(backward, scalar)
    with torch.enable_grad():
        backward(scalar * 1.0, gradient=torch.full((), 3.0, device=device))
    if scalar.grad is None:
        raise BackwardError("backward= did not back-propagate: a scalar got no gradient. It must run the pass.", 0.0)
    if scalar.grad.item() == 1.0:
        raise BackwardError(
            "backward= ignores the seed that it is given, which is the weight of a micro-batch. Pass it on: "
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


def _check_signature(backward: BackwardFn, scalar: Tensor) -> None:
    try:
        inspect.signature(backward).bind(scalar, gradient=scalar)
    except ValueError:  # a builtin without a signature
        return
    except TypeError as error:
        raise BackwardError(
            f"backward= cannot be called as backward(loss, gradient=seed): {error}. The weight of a micro-batch comes "
            "as the seed; pass it on: loss.backward(gradient=gradient).",
            0.0,
        ) from None


def _warn_of_rounding(dtype: torch.dtype) -> None:
    # Python shows a warning once per place, which is what is wanted here.
    warn(
        f"the loss is {dtype}, so the weight of a micro-batch is rounded to it (by up to 2e-3 in bfloat16). Let "
        "loss_fn take the mean in float32: losses.float().mean().",
    )


def graph_leaves(terms: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that a backward pass from these terms accumulates into."""
    found: list[Tensor] = []
    seen: set[Any] = set()
    ahead = [term.grad_fn for term in terms if term.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found.append(leaf)
        ahead += [following for following, _ in node.next_functions if following is not None]
    return found
