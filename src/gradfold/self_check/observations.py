"""Observations: what the runs of a split experiment show besides gradients, for checks of other packages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class ObservedRun(Generic[T]):
    """One run: how many rows it had, and what was seen of it."""

    num_rows: int
    seen: T


class Observations(Generic[T]):
    """Takes down runs as they come, in the order whole, part, part."""

    def __init__(self) -> None:
        self._last: list[ObservedRun[T]] = []
        self._found: list[ObservedRun[T]] | None = None

    def note(self, num_rows: int | None, seen: T) -> None:
        """A run of as many rows; None where they cannot be counted."""
        self._last = [] if num_rows is None else [*self._last[-2:], ObservedRun(num_rows, seen)]
        if len(self._last) == 3:
            whole, first, second = self._last
            if whole.num_rows == first.num_rows + second.num_rows:
                self._found = self._last

    def take(self) -> list[ObservedRun[T]] | None:
        """The last whole and its two parts, once; only where the check has passed is their randomness the same."""
        found, self._found, self._last = self._found, None, []
        return found
