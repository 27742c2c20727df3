"""Tried runs: what the guard's runs of a micro-batch, whole and in two parts, show besides gradients."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__: list[str] = []

T = TypeVar("T")


@dataclass(frozen=True)
class TriedRun(Generic[T]):
    """One of them: how many rows it had, and what was seen of it."""

    num_rows: int
    seen: T


@dataclass(frozen=True)
class WholeAndParts(Generic[T]):
    """Three runs over the same rows, with the same random numbers for each."""

    whole: TriedRun[T]
    parts: tuple[TriedRun[T], TriedRun[T]]


class TriedRuns(Generic[T]):
    """Notes runs as they come, in the order whole, part, part or part, part, whole."""

    def __init__(self) -> None:
        self._last: deque[TriedRun[T]] = deque(maxlen=3)
        self._found: WholeAndParts[T] | None = None

    def note(self, num_rows: int | None, seen: T) -> None:
        """A run of as many rows, None where nobody can count them."""
        if num_rows is None:
            self._last.clear()
            return
        self._last.append(TriedRun(num_rows, seen))
        if len(self._last) < 3:
            return
        first, second, third = self._last
        if first.num_rows == second.num_rows + third.num_rows:
            self._found = WholeAndParts(first, (second, third))
        elif third.num_rows == first.num_rows + second.num_rows:
            self._found = WholeAndParts(third, (first, second))

    def take(self) -> WholeAndParts[T] | None:
        """The last three that belong together, once; only where the guard was content is their randomness the same."""
        found, self._found = self._found, None
        self._last.clear()
        return found
