"""A place: the line of the user's own code on whose behalf something happens, never one inside torch or a library.

An ignore comment: `# gradfold: ignore[GF012]` at the end of a line silences that rule there.

A reading: whether a tensor that the host reads was computed by the model, or is the host's own.

A zeroing by hand: the line that says `p.grad = None` or `p.grad.zero_()`, which no call tells of.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
import tokenize
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []

_COMMENT = re.compile(r"#\s*gradfold:\s*ignore(?:\[([A-Z0-9,\s]+)\])?")


def is_ignored(file: str, line: int, code: str) -> bool:
    """Whether a comment on a line silences a rule there; without codes it silences all."""
    codes = _comments(file).get(line)
    return codes is not None and (not codes or code in codes)


@lru_cache(maxsize=64)
def _comments(file: str) -> dict[int, frozenset[str]]:
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


_OPTIMIZED = 0x1  # inspect.CO_OPTIMIZED: the frame of a function, whose locals are copied when they are read
_REFERENCES_OF_OURS = 3  # the frame's, the variable's and that of the call that counts
_USER, _TORCH, _DOCTOR, _PYTHON = "", "torch", "gradfold.doctor", "python"


@dataclass(frozen=True)
class SourceLocation:
    """A line of the user's code.

    Attributes:
        file, line: where; an empty file is nowhere (no code of the user's is running).
        function: name of the function the line is in, `<module>` outside of functions.
        through: the libraries between this line and what happened, innermost first: ("accelerate",) for a line that
            calls `accelerator.backward`; empty where the line itself calls torch.
    """

    file: str
    line: int
    function: str = "<module>"
    through: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


NOWHERE = SourceLocation("", 0)


@dataclass(frozen=True)
class CallContext:
    """A place, and what encloses it.

    Attributes:
        place: the innermost line of the user's.
        turns: for every loop of the user's that encloses it, outermost first, where the loop is and the whole numbers
            that its variables hold: they tell one pass of an outer loop from the next.
        path: file and line of every call of the user's, innermost first.
        is_gradfold: whether gradfold itself is at work, further out.
    """

    place: SourceLocation
    turns: tuple[tuple[str, int, tuple[int, ...]], ...]
    path: tuple[tuple[str, int], ...]
    is_gradfold: bool


class SourceMap:
    """Knows whose a file is: the user's, torch's, Python's or a library's."""

    def __init__(self, script: Path) -> None:
        self._home = str(script.resolve().parent) + os.sep
        self._owners: dict[str, str] = {}
        paths = sysconfig.get_paths()
        self._torch = str(Path(torch.__file__).parent) + os.sep
        self._doctor = str(Path(__file__).parent) + os.sep
        self._gradfold = str(Path(__file__).parent.parent) + os.sep
        self._libraries = tuple({paths["purelib"] + os.sep, paths["platlib"] + os.sep})
        self._python = tuple({paths["stdlib"] + os.sep, paths["platstdlib"] + os.sep})

    def owner(self, file: str) -> str:
        """The empty string for the user; else the library's name."""
        known = self._owners.get(file)
        if known is None:
            known = self._owners[file] = self._find_owner(file)
        return known

    def _find_owner(self, file: str) -> str:
        if file.startswith("<"):
            return _PYTHON
        path = str(Path(file).absolute())
        if path.startswith(self._doctor):
            return _DOCTOR
        if path.startswith(self._gradfold):
            return "gradfold"
        if path.startswith(self._torch):
            return _TORCH
        for root in self._libraries:
            if path.startswith(root) and not self._home.startswith(root):
                return Path(path[len(root) :]).parts[0].removesuffix(".py")
        for folder in (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}"):
            if folder in path and folder not in self._home:
                return Path(path.rpartition(folder)[2]).parts[0].removesuffix(".py")
        return _PYTHON if path.startswith(self._python) else _USER

    def caller(self, depth: int = 1) -> SourceLocation | None:
        """The user's line, if it calls what is `depth` frames out from here: itself, or through torch alone."""
        frame: FrameType | None = sys._getframe(depth + 1)
        while frame is not None:
            owner = self.owner(frame.f_code.co_filename)
            if owner == _USER:
                return SourceLocation(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
            if owner not in (_TORCH, _DOCTOR, _PYTHON):
                return None
            frame = frame.f_back
        return None

    def here(self) -> SourceLocation:
        """The innermost line of the user's that is running."""
        return self.around(with_turns=False).place

    def around(self, with_turns: bool = True) -> CallContext:
        """The innermost line of the user's that is running, and the loops around it."""
        frame: FrameType | None = sys._getframe(1)
        through: list[str] = []
        place: SourceLocation | None = None
        turns: list[tuple[str, int, tuple[int, ...]]] = []
        path: list[tuple[str, int]] = []
        is_gradfold = False
        while frame is not None:
            code = frame.f_code
            owner = self.owner(code.co_filename)
            if owner == _USER:
                if place is None:
                    place = SourceLocation(code.co_filename, frame.f_lineno, code.co_name, tuple(through))
                path.append((code.co_filename, frame.f_lineno))
                if with_turns:
                    turns[:0] = _turns(frame)
            elif owner == "gradfold":
                is_gradfold = True
            if place is None and owner not in (_USER, _TORCH, _DOCTOR, _PYTHON, *through[-1:]):
                through.append(owner)
            frame = frame.f_back
        return CallContext(
            place or SourceLocation("", 0, through=tuple(through)), tuple(turns), tuple(path), is_gradfold
        )


def _turns(frame: FrameType) -> list[tuple[str, int, tuple[int, ...]]]:
    file, line = frame.f_code.co_filename, frame.f_lineno
    around = [loop for loop in _loops(file, frame.f_code) if loop.first <= line <= loop.last]
    if not around:
        return []
    values = variables(frame, {name for loop in around for name in loop.names})
    return [
        (file, loop.first, tuple(value for name in loop.names if type(value := values.get(name)) is int))
        for loop in around
    ]


def variables(frame: FrameType, names: Collection[str]) -> dict[str, Any]:
    """Some local variables of a frame.

    Before Python 3.13 reading them makes a copy that the frame keeps, and with it tensors that the function has let go
    of: it is emptied, unless the user's code holds it (`locals()` is the same dict).
    """
    everything = frame.f_locals
    values = {name: everything[name] for name in names if name in everything}
    is_copy = frame.f_code.co_flags & _OPTIMIZED and sys.version_info < (3, 13)
    if is_copy and sys.getrefcount(everything) <= _REFERENCES_OF_OURS:
        everything.clear()
    return values


@dataclass(frozen=True)
class _Loop:
    first: int
    last: int
    names: tuple[str, ...]


@lru_cache(maxsize=256)
def _loops(file: str, code: CodeType) -> tuple[_Loop, ...]:
    """The `for` loops of a function, without those of the functions around it."""
    lines = [line for _, _, line in code.co_lines() if line]
    first, last = (code.co_firstlineno, max(lines)) if lines else (0, -1)
    nodes = [node for node in ast.walk(syntax(file)) if isinstance(node, (ast.For, ast.While))]
    inside = [node for node in nodes if first <= node.lineno and (node.end_lineno or 0) <= max(last, first)]
    return tuple(_Loop(node.body[0].lineno, node.end_lineno or node.lineno, _names(node)) for node in inside)


def _names(loop: ast.For | ast.While) -> tuple[str, ...]:
    targets = ast.walk(loop.target if isinstance(loop, ast.For) else loop.test)
    return tuple(node.id for node in targets if isinstance(node, ast.Name))


@lru_cache(maxsize=256)
def syntax(file: str) -> ast.Module:
    """The syntax tree of a file; an empty one where it cannot be read."""
    try:
        return ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return ast.Module(body=[], type_ignores=[])


_MOST_ASSIGNMENTS = 3  # in a row


def depends_on_result(tensor: Tensor, place: SourceLocation) -> bool:
    """Whether a tensor has a graph, or a name in the statement that reads it stands for one that has.

    `torch.isnan(loss)` has no graph, but its `loss` has; `(labels != PAD).sum()` has nothing to do with the model.
    """
    if tensor.requires_grad:
        return True
    names = _names_of_reading(place.file, place.line)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename, frame.f_lineno) != (place.file, place.line):
        frame = frame.f_back
    if frame is None or not names:
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in variables(frame, names).values())


@lru_cache(maxsize=1024)
def _names_of_reading(file: str, line: int) -> frozenset[str]:
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


def zeroing_line(here: SourceLocation, backward: SourceLocation) -> SourceLocation:
    """The line that zeroed gradients by hand, between a backward pass and here; the nearest there is, or here."""
    for place in (backward, here):
        lines = _lines(place.file)
        if lines:
            return SourceLocation(place.file, min(lines, key=lambda line: abs(line - place.line)))
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
