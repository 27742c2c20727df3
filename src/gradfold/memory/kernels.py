"""Kernels that hold more than fake tensors show: known differences between an operator's fake and its CPU kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__: list[str] = []

_aten = torch.ops.aten

# These losses work out one value per element in their result, and shrink it to a number without giving memory back.
_REDUCED_IN_PLACE = (
    _aten.mse_loss.default,
    _aten.smooth_l1_loss.default,
    _aten.binary_cross_entropy.default,
    _aten.soft_margin_loss.default,
)


def held_bytes(function: Callable[..., Any], args: tuple[Any, ...], made: Any) -> int | None:
    """The memory under what an operator made, where its fake on a CPU shows less; else None."""
    if function not in _REDUCED_IN_PLACE or not isinstance(made, FakeTensor) or made.device.type != "cpu":
        return None
    elements = torch.Size(max(sizes) for sizes in zip(*(arg.shape for arg in args[:2]), strict=True))
    return int(elements.numel() * made.element_size())
