"""A place: the line of the user's own code on whose behalf something happens, never one inside torch or a library."""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

__all__: list[str] = []

_OPTIMIZED = 0x1  # inspect.CO_OPTIMIZED: the frame of a function, whose locals are copied when they are read
_REFERENCES_OF_OURS = 3  # the frame's, the variable's and that of the call that counts
_USER, _TORCH, _DOCTOR, _PYTHON = "", "torch", "gradfold.doctor", "python"


@dataclass(frozen=True)
class Place:
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


NOWHERE = Place("", 0)


@dataclass(frozen=True)
class Surroundings:
    """A place, and what encloses it.

    Attributes:
        place: the innermost line of the user's.
        turns: for every loop of the user's that encloses it, outermost first, where the loop is and the whole numbers
            that its variables hold: they tell one pass of an outer loop from the next.
        path: file and line of every call of the user's, innermost first.
        is_gradfold: whether gradfold itself is at work, further out.
    """

    place: Place
    turns: tuple[tuple[str, int, tuple[int, ...]], ...]
    path: tuple[tuple[str, int], ...]
    is_gradfold: bool


class Map:
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

    def caller(self, depth: int = 1) -> Place | None:
        """The user's line, if it calls what is `depth` frames out from here: itself, or through torch alone."""
        frame: FrameType | None = sys._getframe(depth + 1)
        while frame is not None:
            owner = self.owner(frame.f_code.co_filename)
            if owner == _USER:
                return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
            if owner not in (_TORCH, _DOCTOR, _PYTHON):
                return None
            frame = frame.f_back
        return None

    def here(self) -> Place:
        """The innermost line of the user's that is running."""
        return self.around(with_turns=False).place

    def around(self, with_turns: bool = True) -> Surroundings:
        """The innermost line of the user's that is running, and the loops around it."""
        frame: FrameType | None = sys._getframe(1)
        through: list[str] = []
        place: Place | None = None
        turns: list[tuple[str, int, tuple[int, ...]]] = []
        path: list[tuple[str, int]] = []
        is_gradfold = False
        while frame is not None:
            code = frame.f_code
            owner = self.owner(code.co_filename)
            if owner == _USER:
                if place is None:
                    place = Place(code.co_filename, frame.f_lineno, code.co_name, tuple(through))
                path.append((code.co_filename, frame.f_lineno))
                if with_turns:
                    turns[:0] = _turns(frame)
            elif owner == "gradfold":
                is_gradfold = True
            if place is None and owner not in (_USER, _TORCH, _DOCTOR, _PYTHON, *through[-1:]):
                through.append(owner)
            frame = frame.f_back
        return Surroundings(place or Place("", 0, through=tuple(through)), tuple(turns), tuple(path), is_gradfold)


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
