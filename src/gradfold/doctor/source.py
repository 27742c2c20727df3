"""A source location: the line of the user's own code that made a call, never one inside torch or a library."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gradfold.doctor.syntax import loops_of, names_read, zeroing_lines

_OPTIMIZED = 0x1  # inspect.CO_OPTIMIZED: the frame of a function, whose locals are copied when they are read
_OWN_REFERENCES = 3  # to a frame's locals: the frame's, the variable's and that of the call that counts
_USER, _TORCH, _DOCTOR, _GRADFOLD, _PYTHON = "", "torch", "gradfold.doctor", "gradfold", "python"
_TRANSPARENT = (_TORCH, _DOCTOR, _PYTHON)  # calls through these are the caller's own

CallPath = tuple[tuple[str, int], ...]
LoopState = tuple[tuple[str, int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class SourceLocation:
    """A line of the user's code."""

    file: str  # empty where no code of the user's is running
    line: int
    # The libraries between this line and the call, innermost first: ("accelerate",) for a line that calls
    # `accelerator.backward`; empty where the line calls torch itself.
    through: tuple[str, ...] = ()


NOWHERE = SourceLocation("", 0)


@dataclass(frozen=True)
class CallContext:
    """What encloses the call at a location."""

    # For every loop of the user's around it, outermost first: file and line of the loop, and the whole numbers that its
    # variables hold. They tell one iteration of an outer loop from the next.
    loops: LoopState
    call_path: CallPath  # file and line of every call of the user's, innermost first
    is_gradfold: bool  # whether gradfold itself is among the callers


class SourceMap:
    """Knows whose a file is: the user's, torch's, Python's or a library's."""

    def __init__(self, script: Path) -> None:
        self._home = str(script.resolve().parent) + os.sep
        self._packages = (
            (str(Path(__file__).parent) + os.sep, _DOCTOR),
            (str(Path(__file__).parent.parent) + os.sep, _GRADFOLD),
            (str(Path(torch.__file__).parent) + os.sep, _TORCH),
        )
        self._python = tuple(sysconfig.get_paths()[name] + os.sep for name in ("stdlib", "platstdlib"))
        self.owner = cache(self._find_owner)

    def _find_owner(self, file: str) -> str:
        """The library that a file belongs to; the empty string for the user."""
        if file.startswith("<"):
            return _PYTHON
        path = str(Path(file).absolute())
        for root, owner in self._packages:
            if path.startswith(root):
                return owner
        for folder in (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}"):
            root, is_library, file_there = path.rpartition(folder)
            if is_library and not self._home.startswith(root + folder):
                return Path(file_there).parts[0].removesuffix(".py")
        return _PYTHON if path.startswith(self._python) else _USER

    def here(self) -> SourceLocation:
        """The innermost line of the user's that is running."""
        through: list[str] = []
        for frame in _frames():
            owner = self.owner(frame.f_code.co_filename)
            if owner == _USER:
                return SourceLocation(frame.f_code.co_filename, frame.f_lineno, tuple(through))
            if owner not in (*_TRANSPARENT, *through[-1:]):
                through.append(owner)
        return SourceLocation("", 0, through=tuple(through))

    def context(self) -> CallContext:
        """What is around the innermost line of the user's that is running."""
        by_user: list[FrameType] = []
        is_gradfold = False
        for frame in _frames():  # not kept in a list: it would hold the frame of this function, a reference cycle
            owner = self.owner(frame.f_code.co_filename)
            by_user += [frame] * (owner == _USER)
            is_gradfold |= owner == _GRADFOLD
        loops = [loop for frame in reversed(by_user) for loop in _loop_state(frame)]
        path = [(frame.f_code.co_filename, frame.f_lineno) for frame in by_user]
        return CallContext(tuple(loops), tuple(path), is_gradfold)


def _frames() -> Iterator[FrameType]:
    """The frames that are running, innermost first, from the function that asks for them."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _loop_state(frame: FrameType) -> list[tuple[str, int, tuple[int, ...]]]:
    file, line = frame.f_code.co_filename, frame.f_lineno
    around = [loop for loop in loops_of(file, frame.f_code) if loop.first <= line <= loop.last]
    if not around:
        return []
    values = _variables(frame, {name for loop in around for name in loop.names})
    return [
        (file, loop.first, tuple(value for name in loop.names if type(value := values.get(name)) is int))
        for loop in around
    ]


def _variables(frame: FrameType, names: Collection[str]) -> dict[str, Any]:
    """Some local variables of a frame.

    Before Python 3.13 reading them makes a copy that the frame keeps, and with it tensors that the function has
    released: the copy is emptied, unless the user's code holds it (`locals()` is the same dict).
    """
    everything = frame.f_locals
    values = {name: everything[name] for name in names if name in everything}
    is_copy = frame.f_code.co_flags & _OPTIMIZED and sys.version_info < (3, 13)
    if is_copy and sys.getrefcount(everything) <= _OWN_REFERENCES:
        everything.clear()
    return values


def depends_on_result(tensor: Tensor, location: SourceLocation) -> bool:
    """Whether a tensor has a graph, or a name in the statement that reads it stands for a tensor that has one.

    `torch.isnan(loss)` has no graph, but its `loss` has; `(labels != PAD).sum()` has nothing to do with the model.
    """
    if tensor.requires_grad:
        return True
    names = names_read(location.file, location.line)
    line = location.file, location.line
    frame = next((one for one in _frames() if (one.f_code.co_filename, one.f_lineno) == line), None)
    if frame is None or not names:
        return False
    return any(isinstance(value, Tensor) and value.requires_grad for value in _variables(frame, names).values())


def zeroing_location(here: SourceLocation, backward: SourceLocation) -> SourceLocation:
    """The line nearest to a backward pass (else to here) that zeroes gradients without `zero_grad`; else here."""
    for one in (backward, here):
        lines = zeroing_lines(one.file)
        if lines:
            return SourceLocation(one.file, min(lines, key=lambda line: abs(line - one.line)))
    return here
