"""A patch: an attribute of torch's, replaced while the script runs by a function that tells the watch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__: list[str] = []


class Patches:
    """All patches of one run; `undo` takes them back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def undo(self) -> None:
        """Put torch's own functions back."""
        while self._undo:
            self._undo.pop()()

    def replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        """Put `wrap(original)` in the place of an attribute."""
        is_own = name in vars(owner)
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(wrap(original)))
        self._undo.append(lambda: setattr(owner, name, original) if is_own else delattr(owner, name))

    def on_undo(self, action: Callable[[], None]) -> None:
        """Do this when patches are taken back."""
        self._undo.append(action)
