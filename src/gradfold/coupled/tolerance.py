"""The tolerance of statistics that are computed twice: kernels with and without a graph, or on other rows, round."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__: list[str] = []

# Relative, by dtype; another dropout mask moves statistics by a percent and more.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
_OF_HALF_TYPES = 3e-2


def tolerance_of_types(dtypes: Iterable[torch.dtype | None]) -> float:
    """That of the lowest of some dtypes; None is none."""
    known = [_TOLERANCES.get(dtype, _OF_HALF_TYPES) for dtype in dtypes if dtype is not None]
    return max(known, default=_TOLERANCES[torch.float64])
