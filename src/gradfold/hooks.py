"""Hooks on parameters: they would see the gradient of each micro-batch where that of the batch was meant."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gradfold.errors import HookError
from gradfold.warning import warn

__all__: list[str] = []


def refuse_post_accumulate_hooks(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Raise HookError where a hook would act after each micro-batch."""
    if [parameter for parameter in parameters if parameter._post_accumulate_grad_hooks]:
        names = [name for name, parameter in model.named_parameters() if parameter._post_accumulate_grad_hooks]
        raise HookError(
            f"{_some(names)}: a hook registered with register_post_accumulate_grad_hook would run after every "
            "micro-batch, on a part of the gradient (an optimizer in the backward pass steps many times). Remove the "
            "hook and act once after accumulator.backward(batch).",
            tuple(names),
        )


def parameters_with_hooks(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    """Names of the parameters whose gradient a hook sees (`Tensor.register_hook`)."""
    if not [parameter for parameter in parameters if parameter._backward_hooks]:
        return []
    return [name for name, parameter in model.named_parameters() if parameter._backward_hooks]


def warn_of_hooks(names: Sequence[str], known: set[str]) -> None:
    """Warn of hooks on gradients, once per parameter; `known` are those warned of, and grows."""
    new = [name for name in names if name not in known]
    if new:
        known.update(new)
        warn(
            f"hooks on {_some(new)} (Tensor.register_hook) run on the gradient of each micro-batch, not of the batch: "
            "linear ones (scaling, masking, logging) are fine, clipping is not the same.",
        )


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
