"""A reading: whether a tensor that the host reads was computed by the model, or is the host's own."""

from __future__ import annotations

import ast
import sys
from functools import lru_cache
from types import FrameType

from torch import Tensor

from gradfold.doctor.place import Place, syntax, variables

__all__: list[str] = []

_MOST_ASSIGNMENTS = 3  # in a row


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
    """The names that a statement (or the head of a compound one) reads, and those that they were assigned from."""
    names = _read_on(file, line)
    assignments = [node for node in ast.walk(_function(file, line)) if isinstance(node, ast.Assign)]
    for _ in range(_MOST_ASSIGNMENTS):
        for node in assignments:
            targets = {one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)}
            if targets & names:
                names |= _loaded(node.value)
    return frozenset(names)


def _function(file: str, line: int) -> ast.AST:
    """The innermost function around a line, else the module."""
    tree: ast.AST = syntax(file)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.lineno <= line <= (node.end_lineno or 0):
            tree = node  # walked from the outside in
    return tree


def _loaded(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}


def _read_on(file: str, line: int) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(syntax(file)):
        head: ast.AST | None = None
        if isinstance(node, (ast.If, ast.While)):
            head = node.test
        elif isinstance(node, ast.stmt) and not hasattr(node, "body"):
            head = node
        if head is None or not head.lineno <= line <= (head.end_lineno or head.lineno):  # type: ignore[attr-defined]
            continue
        names |= _loaded(head)
    return names
