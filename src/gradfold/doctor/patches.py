"""A patch: an attribute of torch's, replaced while the script runs by a function that takes a look at each call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from gradfold.doctor.guard import Guard, Look

__all__: list[str] = []


class Patches:
    """All patches of one run; `undo` takes them back.

    Args:
        guard: between looks and the script.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Put torch's own functions back."""
        while self._undo:
            self._undo.pop()()

    def look_at(self, owner: Any, name: str, look: Callable[..., Look | None]) -> None:
        """Take a look at every call of a function or method.

        Args:
            owner: the module or class.
            name: of the attribute.
            look: gets the call's arguments; None where there is nothing to see.
        """
        is_own, original, guard = name in vars(owner), getattr(owner, name), self.guard

        @functools.wraps(original)
        def call(*args: Any, **options: Any) -> Any:
            if torch.compiler.is_compiling() or guard.failure is not None:  # a compiler sees what torch has
                return original(*args, **options)
            return guard.call(name, look, original, args, options)

        call.__prepare_scriptable__ = lambda: original  # type: ignore[attr-defined] # what torch.jit.script compiles
        call.gradfold_doctor = True  # type: ignore[attr-defined]
        setattr(owner, name, call)
        self._undo.append(lambda: setattr(owner, name, original) if is_own else delattr(owner, name))

    def on_undo(self, action: Callable[[], None]) -> None:
        """Do this when patches are taken back."""
        self._undo.append(action)
