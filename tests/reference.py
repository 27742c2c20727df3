"""The naive programs that gradfold must equal. Imports torch alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def full_batch_gradient(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """What `loss(model).backward()` leaves in the empty `.grad` fields of a copy of the model, dense, by name."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loss(model).backward()
    return gradients(model)


def total(output: Any) -> Tensor:
    """The loss in what a loss function returns: a tensor or named terms, maybe with metrics."""
    loss = output[0] if isinstance(output, tuple) else output
    return sum(loss.values()) if isinstance(loss, dict) else loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that stand in a model, dense copies, by name."""
    return {
        name: (parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad).detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative_error(gradient: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """||g - ref|| / ||ref|| over all parameters; the names must agree."""
    assert gradient.keys() == expected.keys(), (sorted(gradient), sorted(expected))
    difference = sum(float((gradient[name] - expected[name]).double().square().sum()) for name in expected)
    norm = sum(float(value.double().square().sum()) for value in expected.values())
    return (difference / norm) ** 0.5 if norm else difference**0.5


def state(model: nn.Module) -> dict[str, Any]:
    """All that a window may touch in a model: buffers and gradients (copies), and torch's random state."""
    return {
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "gradients": gradients(model),
        "random": torch.get_rng_state(),
    }


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Bitwise."""
    for part in ("buffers", "gradients"):
        assert found[part].keys() == expected[part].keys(), part
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), (part, name)
    assert torch.equal(found["random"], expected["random"])
