"""The gradients: the `.grad` fields of a model's parameters as one value, set aside while a window fills new ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gradfold.errors import HookError, ModelError

__all__: list[str] = []


class SetAside:
    """The gradients that stood in `.grad` when a window opened; meanwhile the fields are empty.

    Users who back-propagate several losses into one `.grad` find the sum there when the window closes, in the *same*
    tensors as before, since flat buffers and optimizers may hold on to them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._found = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        for parameter, _ in self._found:
            parameter.grad = None

    def add_back(self) -> None:
        """Close: add the new gradients to those found, and merge the repeated entries of sparse ones."""
        for parameter in self._parameters:
            new = parameter.grad
            if new is not None and new.is_sparse:
                parameter.grad = new.coalesce()  # accumulation only concatenates
        if self._found:
            self._add_found()

    @torch.no_grad()
    def _add_found(self) -> None:
        dense: list[tuple[Tensor, Tensor]] = []
        for parameter, found in self._found:
            new = parameter.grad
            if new is None:
                parameter.grad = found
            elif found.is_sparse and not new.is_sparse:
                parameter.grad = new.add_(found)  # a sparse tensor cannot take in a dense one
            elif not found.is_sparse and 0 in found.stride():
                parameter.grad = found + new  # an expanded one cannot be written to
            else:
                parameter.grad = found
                if new.is_sparse:
                    found.add_(new)
                else:
                    dense.append((found, new))
        if dense:
            torch._foreach_add_([found for found, _ in dense], [new for _, new in dense])

    def put_back(self, parameters: Iterable[nn.Parameter]) -> None:
        """Roll back: drop the new gradients of `parameters` (there may be more by now) and leave those found."""
        for parameter in parameters:
            parameter.grad = None
        for parameter, found in self._found:
            parameter.grad = found


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of these modules, each once: `model.parameters()` without another walk through the model."""
    found: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
    return list(found.values())


def check_trainable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Raise ModelError if no parameter requires a gradient."""
    for parameter in parameters:
        if parameter.requires_grad:
            return
    raise ModelError(
        f"{type(model).__name__} has no trainable parameters ({len(parameters)} parameters, none with requires_grad): "
        "there is no gradient to accumulate. Unfreeze some with parameter.requires_grad_(), or pass the module that "
        "holds them."
    )


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
        warnings.warn(
            f"hooks on {_some(new)} (Tensor.register_hook) run on the gradient of each micro-batch, not of the batch: "
            "linear ones (scaling, masking, logging) are fine, clipping is not the same.",
            RuntimeWarning,
            stacklevel=4,
        )


def clip_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients down to a joint 2-norm of at most `max_norm`; gives the norm before, 0-d.

    As `torch.nn.utils.clip_grad_norm_`, which refuses sparse gradients.
    """
    values = _values(parameters)
    norm = torch.nn.utils.get_total_norm(values)
    if math.isinf(max_norm):
        return norm
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for value in values:
        value.mul_(factor.to(value.device))
    return norm


def _values(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    return values


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
