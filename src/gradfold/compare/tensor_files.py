"""The tensors that an arm leaves for its parent, in files: gradients and weights by the name of their parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

__all__: list[str] = []


class Tensors:
    """The names of what an arm saves."""

    START: Final = "start"
    FINAL: Final = "final"
    GRADIENT_FLOAT32: Final = "gradient_float32"
    GRADIENT_FLOAT64: Final = "gradient_float64"
    LAST_WINDOW_FLOAT64: Final = "last_window_float64"


def save_parameters(model: nn.Module, folder: Path, name: str) -> None:
    """Save the weights."""
    _save({key: parameter.detach() for key, parameter in model.named_parameters()}, folder, name)


def save_gradients(model: nn.Module, folder: Path, name: str) -> None:
    """Save `.grad` of every parameter that has one; a missing one counts as zero."""
    gradients = {key: p.grad.detach() for key, p in model.named_parameters() if p.grad is not None}
    _save({key: grad.to_dense() if grad.is_sparse else grad for key, grad in gradients.items()}, folder, name)


def load(folder: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors in float64, or None where the arm did not come so far."""
    path = folder / f"{name}.pt"
    if not path.exists():
        return None
    saved: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {key: tensor.double() for key, tensor in saved.items()}


def norm(tensors: dict[str, Tensor]) -> float:
    """The Euclidean norm over all tensors."""
    return float(torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().sqrt()) if tensors else 0.0


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
    """`left - right` per name, where a missing tensor is zero."""
    zero = torch.zeros(())
    return {key: left.get(key, zero) - right.get(key, zero) for key in {**left, **right}}


def _save(tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    torch.save(tensors, folder / f"{name}.pt")
