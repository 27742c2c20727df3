"""A search for weights: which count in a batch gives a part of it the share that its gradient shows."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, leaves_by_path

_IGNORED = (-100, -1, 0, 255)  # labels that are commonly ignored; -100 is torch's own
_LABEL_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
_CLOSE = 2e-3


def find_weight(first: Batch, second: Batch, rows: tuple[int, int], share: float) -> str | None:
    """The `weight=` under which `first` makes up `share` of both parts together, as Python; None if nothing fits."""
    if abs(rows[0] / sum(rows) - share) < _CLOSE:
        return '"samples"'
    others = dict(_candidates(second))
    for text, count in _candidates(first):
        total = float(count()) + float(others[text]()) if text in others else 0.0
        if total and abs(float(count()) / total - share) < _CLOSE:
            return text
    return None


def _candidates(batch: Batch) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The likeliest first: labels, then masks and other numbers per row."""
    leaves = [
        (path, leaf)
        for path, leaf in leaves_by_path(batch)
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.layout is torch.strided and not leaf.is_complex()
    ]
    labels = [(path, leaf) for path, leaf in leaves if leaf.dtype in _LABEL_TYPES]
    shifted = [(path, leaf[..., 1:]) for path, leaf in labels if leaf.dim() > 1]
    for ignored in _IGNORED:
        of_index = "" if ignored == -100 else f", ignore_index={ignored}"
        for shift, counted in (("", labels), (", shift=True", shifted)):
            for path, leaf in counted:
                yield f"gradfold.token_count({_where(path)}{of_index}{shift})", leaf.ne(ignored).sum
    for path, leaf in leaves:
        yield f"lambda batch: batch{path}.sum()", leaf.sum
        yield f"lambda batch: (batch{path} > 0).sum()", leaf.gt(0).sum


def _where(path: str) -> str:
    """A key or index as the user would write it, where the path is no more than that."""
    try:
        key = ast.literal_eval(path[1:-1]) if path.startswith("[") and path.endswith("]") else None
    except (ValueError, SyntaxError):
        key = None
    if isinstance(key, str):
        return repr(key) if '"' in key or "\\" in key else f'"{key}"'
    return str(key) if isinstance(key, int) else f"lambda batch: batch{path}"
