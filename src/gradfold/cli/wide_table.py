"""A wide table: figures by name. Where a terminal is narrow it becomes several, since a figure must not be cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Literal, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__: list[str] = []

_WIDTH = 100  # where output is no terminal


class Column(NamedTuple):
    """A column of figures.

    Attributes:
        heading: of one or several lines.
        cells: one per row.
        justify: "left" for words.
    """

    heading: str
    cells: Sequence[str]
    justify: Literal["left", "right"] = "right"

    @property
    def width(self) -> int:
        """In characters."""
        return max(map(len, [*self.heading.splitlines(), *self.cells]))


def wide_enough(console: Console) -> Console:
    """The console, with the width that tables need where it is no terminal and rich assumes 80 columns."""
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def columns_of(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Column]:
    """Rows of cells as columns."""
    return [Column(heading, cells) for heading, *cells in zip(headings, *rows, strict=True)]


def print_wide(
    console: Console,
    title: str,
    names: Sequence[Column],
    groups: Sequence[Sequence[Column]],
    styles: Sequence[str] | None = None,
) -> None:
    """Print a table that is cut between groups of columns, or within one, only where it would be too wide.

    Args:
        console: to print on.
        title: above it.
        names: columns that every table begins with.
        groups: columns that belong together.
        styles: of the rows.
    """
    console.print(Text(title, style="bold"))
    for number, (gap, columns) in enumerate(_tables(names, groups, console.width)):
        if number:
            console.print()
        table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False)
        for column in (*names, *columns):
            table.add_column(column.heading, justify=column.justify, no_wrap=True, vertical="bottom")
        for row, cells in enumerate(zip(*[column.cells for column in (*names, *columns)], strict=True)):
            table.add_row(*map(Text, cells), style=None if styles is None else styles[row])
        console.print(table)


def _tables(
    names: Sequence[Column], groups: Sequence[Sequence[Column]], width: int
) -> list[tuple[int, Sequence[Column]]]:
    """The columns of each table beside the names, with the gap between them."""
    every = list(chain(*groups))
    for gap in (2, 1):
        if _width([*names, *every], gap) <= width:
            return [(gap, every)]
    tables: list[list[Column]] = [[]]
    for group in groups:
        if tables[-1] and _width([*names, *tables[-1], *group]) > width:
            tables.append([])
        for column in group:
            if tables[-1] and _width([*names, *tables[-1], column]) > width:
                tables.append([])
            tables[-1].append(column)
    return [(2, columns) for columns in tables]


def _width(columns: Sequence[Column], gap: int = 2) -> int:
    return sum(column.width + gap for column in columns)
