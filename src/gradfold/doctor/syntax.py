"""What the source text of a script says: ignore comments, loops, the names a line reads, lines that zero gradients."""

from __future__ import annotations

import ast
import re
import tokenize
from functools import lru_cache
from pathlib import Path
from types import CodeType
from typing import NamedTuple

_COMMENT = re.compile(r"#\s*gradfold:\s*ignore(?:\[([A-Z0-9,\s]+)\])?")
_ZEROING = re.compile(r"\.grad = (.* = )?None$|\.grad\b.*\.zero_\(\)$|\._foreach_zero_\(.*\)$")
_MOST_ASSIGNMENTS = 3  # in a row, between a name that a line reads and the one it was assigned from


@lru_cache(maxsize=256)
def syntax_tree(file: str) -> ast.Module:
    """The syntax tree of a file; an empty one where it cannot be read."""
    try:
        return ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


def is_ignored(file: str, line: int, code: str) -> bool:
    """Whether a comment `# gradfold: ignore[GF012]` on a line ignores a rule there; without codes it ignores all."""
    codes = _ignore_comments(file).get(line)
    return codes is not None and (not codes or code in codes)


@lru_cache(maxsize=64)
def _ignore_comments(file: str) -> dict[int, frozenset[str]]:
    found: dict[int, frozenset[str]] = {}
    try:
        with Path(file).open("rb") as source:
            for token in tokenize.tokenize(source.readline):
                match = _COMMENT.search(token.string) if token.type == tokenize.COMMENT else None
                if match:
                    found[token.start[0]] = frozenset(re.findall(r"[A-Z0-9]+", match[1] or ""))
    except (OSError, SyntaxError, tokenize.TokenError):
        pass
    return found


class Loop(NamedTuple):
    """A `for` or `while` loop: the lines of its body, and the variables of its head."""

    first: int
    last: int
    names: tuple[str, ...]


@lru_cache(maxsize=256)
def loops_of(file: str, code: CodeType) -> tuple[Loop, ...]:
    """The loops of a function, without those of the functions around it."""
    lines = [line for _, _, line in code.co_lines() if line]
    first, last = (code.co_firstlineno, max(lines)) if lines else (0, -1)
    nodes = [node for node in ast.walk(syntax_tree(file)) if isinstance(node, (ast.For, ast.While))]
    inside = [node for node in nodes if first <= node.lineno and (node.end_lineno or 0) <= max(last, first)]
    return tuple(Loop(node.body[0].lineno, node.end_lineno or node.lineno, _loop_names(node)) for node in inside)


def _loop_names(loop: ast.For | ast.While) -> tuple[str, ...]:
    targets = ast.walk(loop.target if isinstance(loop, ast.For) else loop.test)
    return tuple(node.id for node in targets if isinstance(node, ast.Name))


@lru_cache(maxsize=1024)
def names_read(file: str, line: int) -> frozenset[str]:
    """The names that a statement (or the head of a compound one) reads, and those that they were assigned from."""
    names = {name for node in ast.walk(syntax_tree(file)) for name in _names_of_head(node, line)}
    assignments = [node for node in ast.walk(_function_around(file, line)) if isinstance(node, ast.Assign)]
    for _ in range(_MOST_ASSIGNMENTS):
        for node in assignments:
            targets = {one.id for target in node.targets for one in ast.walk(target) if isinstance(one, ast.Name)}
            if targets & names:
                names |= _loaded_names(node.value)
    return frozenset(names)


def _names_of_head(node: ast.AST, line: int) -> set[str]:
    """The names that a statement reads on a line: all of a simple one, the condition of `if` and `while`."""
    head: ast.expr | ast.stmt
    if isinstance(node, (ast.If, ast.While)):
        head = node.test
    elif isinstance(node, ast.stmt) and not hasattr(node, "body"):
        head = node
    else:
        return set()
    return _loaded_names(head) if head.lineno <= line <= (head.end_lineno or head.lineno) else set()


def _loaded_names(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)}


def _function_around(file: str, line: int) -> ast.AST:
    """The innermost function around a line, else the module."""
    found: ast.AST = syntax_tree(file)
    for node in ast.walk(found):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.lineno <= line <= (node.end_lineno or 0):
            found = node  # ast.walk goes from the outside in
    return found


@lru_cache(maxsize=64)
def zeroing_lines(file: str) -> tuple[int, ...]:
    """The lines that zero gradients without a call of `zero_grad`: `p.grad = None`, `p.grad.zero_()`."""
    statements = [one for one in ast.walk(syntax_tree(file)) if isinstance(one, (ast.Assign, ast.Expr))]
    return tuple(sorted({one.lineno for one in statements if _ZEROING.search(ast.unparse(one))}))


def has_inverse(file: str) -> bool:
    """Whether a division of a constant, such as `1 / n`, is anywhere in a file."""
    operations = [one for one in ast.walk(syntax_tree(file)) if isinstance(one, ast.BinOp)]
    return any(isinstance(one.op, ast.Div) and isinstance(one.left, ast.Constant) for one in operations)
