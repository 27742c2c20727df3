"""Checks of a model: hooks on parameters, layers that draw random numbers, lazy layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from torch import nn
from torch.nn.parameter import is_lazy

from gradfold.errors import HookError, ModelError
from gradfold.messages import join_names, warn


def dropping_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules in training mode that look like dropout, or have a rate of it (attention, recurrent layers), by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if module.training
        and (
            any(word in type(module).__name__.lower() for word in ("dropout", "droppath", "stochasticdepth"))
            or any("drop" in key and isinstance(rate, float) and rate > 0 for key, rate in vars(module).items())
        )
    }


def check_hooks(model: nn.Module, parameters: Sequence[nn.Parameter], warned_of: set[str]) -> None:
    """Warn of hooks that see the gradient of each micro-batch; HookError where one would act after each.

    `warned_of`: the names that were warned of before, to which new ones are added.
    """
    if [parameter for parameter in parameters if parameter._post_accumulate_grad_hooks]:
        names = [name for name, parameter in model.named_parameters() if parameter._post_accumulate_grad_hooks]
        raise HookError(
            f"{join_names(names, 3)}: a hook registered with register_post_accumulate_grad_hook would run after every "
            "micro-batch, on a part of the gradient (an optimizer in the backward pass steps many times). Remove the "
            "hook and act once after accumulator.backward(batch).",
            tuple(names),
        )
    new = [name for name in parameters_with_hooks(model, parameters) if name not in warned_of]
    if new:
        warned_of.update(new)
        warn(
            f"hooks on {join_names(new, 3)} (Tensor.register_hook) run on the gradient of each micro-batch, not of the "
            "batch: linear ones (scaling, masking, logging) are fine, clipping is not the same.",
        )


def parameters_with_hooks(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[str]:
    """Names of the parameters whose gradient a hook sees (`Tensor.register_hook`)."""
    if not [parameter for parameter in parameters if parameter._backward_hooks]:
        return []
    return [name for name, parameter in model.named_parameters() if parameter._backward_hooks]


def refuse_lazy(model: nn.Module, asking: str) -> None:
    """Raise ModelError where layers have no sizes yet; `asking`: who needs them."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    names = sorted({name.rpartition(".")[0] or type(model).__name__ for name, one in tensors if is_lazy(one)})
    if names:
        shown = join_names(list(map(repr, names)), 3)
        raise ModelError(
            f"{asking} needs to know the sizes of all layers, and lazy ones have none before their first forward pass: "
            f"{shown}. Run one, on a row or two, before the optimizer is made: model(inputs[:2])."
        )
