"""A reading: whether a tensor that the host reads was computed by the model, or is the host's own."""

from __future__ import annotations

import ast
import sys
from functools import lru_cache
from types import FrameType

from torch import Tensor

from gradfold.doctor.place import Place, syntax, variables

__all__: list[str] = []


def depends_on_result(tensor: Tensor, place: Place) -> bool:
    """Whether a tensor has a graph, or a name in the statement that reads it stands for one that has.

    `torch.isnan(loss)` has no graph, but its `loss` has; `(labels != PAD).sum()` has nothing to do with the model.
    """
    if tensor.requires_grad:
        return True
    names = _names(place.file, place.line)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename, frame.f_lineno) != (place.file, place.line):
        frame = frame.f_back
    if frame is None or not names:
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in variables(frame, names).values())


@lru_cache(maxsize=1024)
def _names(file: str, line: int) -> frozenset[str]:
    """The names that a simple statement, or the head of a compound one, reads."""
    names: set[str] = set()
    for node in ast.walk(syntax(file)):
        head: ast.AST | None = None
        if isinstance(node, (ast.If, ast.While)):
            head = node.test
        elif isinstance(node, ast.stmt) and not hasattr(node, "body"):
            head = node
        if head is None or not head.lineno <= line <= (head.end_lineno or head.lineno):  # type: ignore[attr-defined]
            continue
        names |= {one.id for one in ast.walk(head) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}
    return frozenset(names)
