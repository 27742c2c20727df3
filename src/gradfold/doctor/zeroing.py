"""A zeroing by hand: the line that says `p.grad = None` or `p.grad.zero_()`, which no call tells of."""

from __future__ import annotations

import ast
from functools import lru_cache

from gradfold.doctor.place import Place, syntax

__all__: list[str] = []


def zeroing_line(here: Place, backward: Place) -> Place:
    """The line that zeroed gradients by hand, between a backward pass and here; the nearest there is, or here."""
    for place in (backward, here):
        lines = _lines(place.file)
        if lines:
            return Place(place.file, min(lines, key=lambda line: abs(line - place.line)))
    return here


@lru_cache(maxsize=64)
def _lines(file: str) -> tuple[int, ...]:
    return tuple(
        sorted({node.lineno for node in ast.walk(syntax(file)) if isinstance(node, ast.stmt) and _zeroes(node)})
    )


def _zeroes(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        is_none = isinstance(node.value, ast.Constant) and node.value.value is None
        return is_none and any(isinstance(target, ast.Attribute) and target.attr == "grad" for target in node.targets)
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    function = node.value.func
    if not isinstance(function, ast.Attribute):
        return False
    if function.attr == "zero_":
        return any(isinstance(one, ast.Attribute) and one.attr == "grad" for one in ast.walk(function.value))
    return function.attr == "_foreach_zero_"
