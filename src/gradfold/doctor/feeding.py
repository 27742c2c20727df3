"""A feeding: which batch of which loader, in which of its passes, the script has fetched last."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from gradfold.doctor.events import Fetch, Pass, Tape
from gradfold.doctor.place import NOWHERE, Map
from gradfold.doctor.stop import Stop

__all__: list[str] = []

_DEPTH = 3  # to which a batch is searched for a tensor


class Feeding:
    """Of all loaders of a script.

    Attributes:
        loader: the one that gave the last batch, counted from 0; None before the first.
        rows: of that batch.
        num_fetches: batches so far.
    """

    def __init__(self, tape: Tape, places: Map, stop: Stop) -> None:
        self.loader: int | None = None
        self.rows = 0
        self.num_fetches = 0
        self._tape = tape
        self._places = places
        self._stop = stop
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._passes: dict[int, int] = {}
        self._positions: dict[int, int] = {}

    @property
    def pass_number(self) -> int:
        """Of the last batch's pass over its loader, from 1."""
        return 0 if self.loader is None else self._passes[self.loader]

    def pass_begins(self, loader: Any) -> int:
        """An iteration over a loader begins: its number among loaders."""
        number = self._numbers.setdefault(loader, len(self._numbers))
        self._passes[number] = self._passes.get(number, 0) + 1
        self._positions[number] = 0
        try:
            length: int | None = len(loader)
        except (TypeError, NotImplementedError):
            length = None
        self._tape.add(Pass(self._tape.next, self._places.here(), number, length))
        self._stop.note_pass(number, length)
        return number

    def fetched(self, loader: int, batch: Any, seconds: float) -> None:
        """A loader gave a batch; None where its pass has ended."""
        position, rows = -1, 0
        if batch is not None:
            position, rows = self._positions[loader], _rows(batch)
            self._positions[loader] += 1
            self.num_fetches += 1
            self.loader, self.rows = loader, rows
        self._tape.add(Fetch(self._tape.next, NOWHERE, loader, position, rows, seconds))


def _rows(batch: Any, depth: int = 0) -> int:
    """Of the first tensor in a batch of any nesting."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    if depth > _DEPTH:
        return 0
    values = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, (list, tuple)) else ()
    return next((rows for value in list(values)[:8] if (rows := _rows(value, depth + 1))), 0)
