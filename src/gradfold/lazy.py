"""A lazy layer: one that makes its parameters in its first forward pass, and has no sizes before."""

from __future__ import annotations

from itertools import chain

from torch import nn
from torch.nn.parameter import is_lazy

from gradfold.errors import ModelError

__all__: list[str] = []


def refuse_lazy(model: nn.Module, asking: str) -> None:
    """Raise ModelError where layers have no sizes yet; `asking`: who needs them."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    names = sorted({name.rpartition(".")[0] or type(model).__name__ for name, one in tensors if is_lazy(one)})
    if names:
        shown = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ModelError(
            f"{asking} needs to know the sizes of all layers, and lazy ones have none before their first forward pass: "
            f"{shown}. Run one, on a row or two, before the optimizer is made: model(inputs[:2])."
        )
