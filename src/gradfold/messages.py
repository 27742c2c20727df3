"""Messages: warnings at the line of the user's code that called gradfold, and wording that several messages share."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence


def warn(message: str) -> None:
    """Warn at the innermost line outside of gradfold."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "gradfold":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def join_names(names: Sequence[str], limit: int = 8) -> str:
    """Names in a sentence: "1, 2 and 3"; of more than `limit` the first, and how many more."""
    if len(names) > limit:
        return f"{', '.join(names[:limit])} and {len(names) - limit} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
