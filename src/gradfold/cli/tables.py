"""Tables in a terminal, and the progress of a comparison.

Where a terminal is too narrow for a table of figures, it becomes several tables, since a figure must not be cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from gradfold.compare.results import Comparison
from gradfold.compare.runner import ArmProgress, OnProgress
from gradfold.compare.summary import Column, Columns, cost_table, distance_table, footnotes, number

_WIDTH_BESIDE_BAR = 64  # of the longest name of an arm, percentage, time and loss
_WIDTH = 100  # where output is not a terminal


@contextmanager
def showing_progress(console: Console) -> Iterator[OnProgress]:
    """Bars while the block runs; the value is what to call with each progress."""
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=max(10, min(30, console.width - _WIDTH_BESIDE_BAR))),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(progress: ArmProgress) -> None:
            if progress.arm not in tasks:
                tasks[progress.arm] = bars.add_task(progress.arm, total=None, start=False, state="waiting")
            task = tasks[progress.arm]
            if progress.state == "starting":
                bars.start_task(task)
            if progress.state in ("finished", "failed"):
                bars.stop_task(task)
            bars.update(task, total=progress.total_samples, completed=progress.samples, state=_state(progress))

        yield on_progress


def _state(progress: ArmProgress) -> str:
    if progress.loss is None:
        return progress.state
    ending = f", {progress.state}" if progress.state == "failed" else ""
    return f"{progress.updates:,} update{'s' * (progress.updates != 1)}, loss {number(progress.loss)}{ending}"


def output_console() -> Console:
    """Standard output, as wide as tables need where it is not a terminal and rich assumes 80 columns."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def print_wide(
    console: Console, title: str, names: Columns, groups: Sequence[Columns], styles: Sequence[str] | None = None
) -> None:
    """Print a table of figures; where it is too wide, as several tables, split between groups of columns or within one.

    Every table begins with the columns `names`; `styles` are those of the rows.
    """
    console.print(Text(title, style="bold"))
    for index, (gap, columns) in enumerate(_tables(names, groups, console.width)):
        if index:
            console.print()
        table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False)
        for column in columns:
            table.add_column(column.heading, justify=column.justify, no_wrap=True, vertical="bottom")
        for row, cells in enumerate(zip(*[column.cells for column in columns], strict=True)):
            table.add_row(*map(Text, cells), style=None if styles is None else styles[row])
        console.print(table)


def _tables(names: Columns, groups: Sequence[Columns], width: int) -> list[tuple[int, Columns]]:
    """The gap between columns, and the columns, of each table."""
    every = [*names, *chain(*groups)]
    for gap in (2, 1):
        if _width(every, gap) <= width:
            return [(gap, every)]
    tables = [list(names)]
    for group in groups:
        # A group begins a table where the last one has no room for all of it; a column, where for no other.
        if len(tables[-1]) > len(names) and _width([*tables[-1], *group]) > width:
            tables.append(list(names))
        for column in group:
            if len(tables[-1]) > len(names) and _width([*tables[-1], column]) > width:
                tables.append(list(names))
            tables[-1].append(column)
    return [(2, columns) for columns in tables]


def _width(columns: Columns, gap: int = 2) -> int:
    return sum(column.width + gap for column in columns)


def print_words(
    console: Console, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], blank_lines: int = 0
) -> None:
    """Print a table of words, which may wrap in all columns but the first, with blank lines between rows."""
    console.print(Text(title, style="bold"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, blank_lines, 0))
    for heading in headings:
        table.add_column(heading, no_wrap=heading == headings[0])
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def print_comparison(comparison: Comparison, files: Sequence[Path]) -> None:
    """Print a comparison on standard output."""
    console = output_console()
    console.print(_heading(comparison))
    arms = Column("arm", [row.arm for row in comparison.rows], "left")
    print_wide(console, "\nDistance from the full batch", [arms], distance_table(comparison))
    print_wide(console, "\nCost", [arms], cost_table(comparison))
    console.print()
    for note in footnotes(comparison):
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row("•", Text(note))
        console.print(grid)
    if files:
        console.print(Text(f"\nReport: {files[-1]} (with {len(files) - 1} files beside it)"))


def _heading(comparison: Comparison) -> Text:
    sizes = comparison.sizes
    epochs = f"{sizes.num_epochs} epoch{'s' * (sizes.num_epochs > 1)}"
    on_ranks = f" on each of {sizes.num_ranks} processes" if sizes.num_ranks > 1 else ""
    text = Text.assemble((comparison.workload.name, "bold"), f": {comparison.workload.description}\n")
    text.append(
        f"{sizes.num_samples:,} samples, {epochs}, global batch {sizes.global_batch_size}, "
        f"micro-batch {sizes.micro_batch_size}{on_ranks}, seed {comparison.settings.seed}",
        style="dim",
    )
    return text
