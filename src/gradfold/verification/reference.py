"""The full-batch gradient in plain torch, which accumulation must equal. Imports nothing from gradfold."""

from __future__ import annotations

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
    """||gradient - expected|| / ||expected|| over all parameters, where a missing gradient is zero.

    Absolute where all that is expected is zero.
    """
    squares = [difference_norm(gradient.get(name), expected.get(name)) ** 2 for name in {**expected, **gradient}]
    norm = sum(difference_norm(value, None) ** 2 for value in expected.values()) ** 0.5
    difference = float(sum(squares) ** 0.5)
    return difference / norm if norm else difference


def difference_norm(gradient: Tensor | None, expected: Tensor | None) -> float:
    """||gradient - expected||, where None is zero."""
    if gradient is None or expected is None:
        found = gradient if gradient is not None else expected
        return 0.0 if found is None else float(_wide(found).norm())
    return float((_wide(gradient) - _wide(expected)).norm())


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)
