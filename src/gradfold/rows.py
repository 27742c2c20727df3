"""Rows: which ones of a global batch a micro-batch holds: consecutive ones (a range), or any selection of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

__all__: list[str] = []

Rows: TypeAlias = Sequence[int]
"""Positions in the global batch; slices of it are rows again."""

_MOST_NAMED = 4


def name_rows(rows: Rows) -> str:
    """The rows, for a message.

    >>> name_rows(range(4, 8)), name_rows((7,)), name_rows((7, 0, 3)), name_rows(tuple(range(0, 20, 2)))
    ('rows 4 to 7', 'row 7', 'rows 7, 0 and 3', 'rows 0, 2, 4, 6 and 6 more')
    """
    if isinstance(rows, range) and rows.step == 1:
        return f"rows {rows.start} to {rows.stop - 1}"
    if len(rows) == 1:
        return f"row {rows[0]}"
    named = [str(row) for row in rows[:_MOST_NAMED]]
    if len(rows) > _MOST_NAMED:
        return f"rows {', '.join(named)} and {len(rows) - _MOST_NAMED} more"
    return f"rows {', '.join(named[:-1])} and {named[-1]}"


def shift_rows(rows: Rows, by: int) -> Rows:
    """The same rows in a batch that has `by` others before them."""
    if isinstance(rows, range):
        return range(rows.start + by, rows.stop + by, rows.step)
    return tuple(row + by for row in rows)
