"""A warning: said where the user's own code called gradfold, however deep inside it was found."""

from __future__ import annotations

import sys
import warnings

__all__: list[str] = []


def warn(message: str) -> None:
    """Warn at the innermost line outside of gradfold."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "gradfold":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
