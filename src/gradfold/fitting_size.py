"""The fitting size: how much has turned out to fit at once, in rows or in padded tokens, learned where memory ran out.

It shrinks with every recovery. After a long quiet period twice as many are tried again, since what took the memory may
be gone; each time that fails, the next period is twice as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__: list[str] = []

_PATIENCE = 256  # windows


class FittingSize:
    """What an accumulator knows about sizes.

    Attributes:
        rows: at most so many at once (padded tokens under a `TokenBudget`); None while nothing has failed.
        proven: so many have gone through at once.
    """

    def __init__(self) -> None:
        self.rows: int | None = None
        self.proven = 0
        self._quiet = 0
        self._patience = _PATIENCE
        self._is_trying = False

    def limit(self, asked: int | None) -> int | None:
        """The micro-batch size to run where `asked` is the user's."""
        if self.rows is None:
            return asked
        return self.rows if asked is None else min(self.rows, asked)

    def shrink(self, rows: int) -> None:
        """More than `rows` did not fit."""
        if self._is_trying:
            self._patience *= 2
        self.rows = rows if self.rows is None else min(self.rows, rows)
        self._quiet, self._is_trying = 0, False

    def note_quiet(self, largest: int, asked: int | None) -> None:
        """A window without a fault went through, with a largest micro-batch of this size."""
        self.proven = max(self.proven, largest)
        if self.rows is None:
            return
        if self._is_trying and largest > self.rows // 2:
            self._is_trying = False  # it fits now
        self._quiet += 1
        if self._quiet >= self._patience:
            self.rows, self._quiet, self._is_trying = 2 * self.rows, 0, True
            if asked is not None and self.rows >= asked:
                self.rows = asked

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to cut its batches as this one would have."""
        return {name.lstrip("_"): value for name, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.rows = state["rows"]
        self.proven = state["proven"]
        self._quiet = state["quiet"]
        self._patience = state["patience"]
        self._is_trying = state["is_trying"]
