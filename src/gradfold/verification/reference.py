"""The full-batch gradient in plain torch, which accumulation must equal. Imports nothing from gradfold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def full_batch_gradient(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Any], batch: Any
) -> tuple[dict[str, Tensor], float]:
    """What `loss_fn(model, batch).backward()` leaves in `.grad`, dense and by name, and the loss.

    A loss may be a tensor or a dict of terms, whose sum is the loss, alone or in a pair with metrics.
    """
    model.zero_grad()
    output = loss_fn(model, batch)
    loss = output[0] if isinstance(output, tuple) else output
    if isinstance(loss, Mapping):
        loss = torch.stack([term.to(torch.promote_types(term.dtype, torch.float32)) for term in loss.values()]).sum()
    loss.backward()
    return gradients(model), float(loss.detach())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that stand in a model, dense copies, by name."""
    return {
        name: (parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad).detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative_error(gradient: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """||gradient - expected|| / ||expected|| over all parameters; absolute where all that is expected is zero."""
    difference, norm = (math.hypot(*differences(found, expected).values()) for found in (gradient, {}))
    return difference / norm if norm else difference


def differences(gradient: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """||gradient - expected|| of each parameter, in float64; a missing gradient is zero."""

    def difference(name: str) -> float:
        both = [found[name] for found in (gradient, expected) if name in found]
        one, *other = (values.to(torch.promote_types(values.dtype, torch.float64)) for values in both)
        return float((one - other[0] if other else one).norm())

    return {name: difference(name) for name in {**expected, **gradient}}
