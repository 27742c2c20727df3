"""Dropout: the modules of a model that leave out values at random while it is in training."""

from __future__ import annotations

from torch import nn

__all__: list[str] = []


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
