"""The tables of a comparison in a terminal, and what they show in plain words below.

The progress of a comparison: a line per arm on a terminal's standard error, and nothing elsewhere.

A wide table: figures by name. Where a terminal is narrow it becomes several, since a figure must not be cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from gradfold.compare import summary as readable
from gradfold.compare.report import metric_names
from gradfold.compare.results import Comparison, Row
from gradfold.compare.runner import OnProgress, Progress
from gradfold.compare.summary import number, verdict
from gradfold.memory.amount import written

__all__: list[str] = []

_WIDTH_BESIDE_BAR = 64  # of the longest name of an arm, share, time and loss


@contextmanager
def showing_progress(console: Console) -> Iterator[OnProgress]:
    """Bars while the block runs; the value is what to call with each progress."""
    if not console.is_terminal:
        yield lambda progress: None
        return
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=max(10, min(30, console.width - _WIDTH_BESIDE_BAR))),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        transient=True,
    )
    with bars:
        tasks: dict[str, TaskID] = {}

        def on_progress(progress: Progress) -> None:
            if progress.arm not in tasks:
                tasks[progress.arm] = bars.add_task(progress.arm, total=None, start=False, state="waiting")
            task = tasks[progress.arm]
            if progress.state == "starting":
                bars.start_task(task)
            if progress.state in ("finished", "failed"):
                bars.stop_task(task)
            bars.update(task, total=progress.total_samples, completed=progress.samples, state=_state(progress))

        yield on_progress


def _state(progress: Progress) -> str:
    if progress.loss is None:
        return progress.state
    ending = f", {progress.state}" if progress.state == "failed" else ""
    return f"{progress.updates:,} update{'s' * (progress.updates != 1)}, loss {number(progress.loss)}{ending}"


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
    for index, (gap, columns) in enumerate(_tables(names, groups, console.width)):
        if index:
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


def print_comparison(comparison: Comparison, files: Sequence[Path]) -> None:
    """Print a comparison on standard output."""
    console = wide_enough(Console(highlight=False))
    console.print(_heading(comparison))
    _print_sameness(console, comparison)
    _print_costs(console, comparison)
    console.print()
    for sentence in verdict(comparison):
        console.print(_bullet(sentence))
    if files:
        report = next(path for path in files if path.suffix == ".html")
        console.print(Text(f"\nReport: {report} (with {len(files) - 1} files beside it)"))


def _bullet(sentence: str) -> Table:
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row("•", Text(sentence))
    return grid


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


def _print_sameness(console: Console, comparison: Comparison) -> None:
    """How far each arm is from the full batch, and where its training ended."""
    metrics = metric_names(comparison)
    has_last_window = bool(comparison.sizes.last_window)
    distances = [f"first\ngradient\n{comparison.first_gradients_in}", "first\ngradient\nfloat64"]
    distances += ["last\nwindow\nfloat64"] * has_last_window + ["final\nweights"]
    ends = ["training\nloss", *[f"held-out\n{name.replace('_', ' ')}" for name in metrics], "updates"]
    num = len(distances) + len(ends)
    rows = [_sameness_cells(row, has_last_window, metrics, num) for row in comparison.rows]
    columns = columns_of([*distances, *ends], rows)
    groups = [columns[: len(distances)], columns[len(distances) :]]
    print_wide(console, "\nDistance from the full batch", [_arms(comparison)], groups)


def _sameness_cells(row: Row, has_last_window: bool, metrics: Sequence[str], num_cells: int) -> list[str]:
    if row.measured is None:
        return _failed(num_cells)
    one = row.deviations
    deviations = [one.gradient_float32, one.gradient_float64, *[one.last_window_float64] * has_last_window, one.weights]
    cells = [readable.deviation(deviation) for deviation in deviations]
    if row.is_reference:
        cells = ["reference", *[""] * (len(deviations) - 1)]
    cells.append(readable.number(row.measured.final_loss))
    for name in metrics:
        value = row.measured.metrics.get(name)
        cells.append(readable.MISSING if value is None else readable.metric(name, value))
    return [*cells, f"{row.measured.num_updates:,}"]


def _print_costs(console: Console, comparison: Comparison) -> None:
    """What each arm costs; the report has more."""
    times = ["samples/s", "total", "forward", "backward", "update", "other"]
    headings = [*times, "memory\nadded", "peak of\ntensors"]
    columns = columns_of(headings, [_cost_cells(row, len(headings)) for row in comparison.rows])
    print_wide(console, "\nCost", [_arms(comparison)], [columns[: len(times)], columns[len(times) :]])


def _cost_cells(row: Row, num_cells: int) -> list[str]:
    if row.measured is None:
        return _failed(num_cells)
    seconds, memory, tracked = row.measured.seconds, row.measured.memory, row.measured.tracked
    spent = (seconds.total, seconds.forward, seconds.backward, seconds.update, seconds.other)
    return [
        readable.number(row.measured.samples_per_s),
        *map(readable.seconds, spent),
        written(memory.rise_bytes),
        readable.MISSING if tracked is None else written(tracked.peak_bytes),
    ]


def _arms(comparison: Comparison) -> Column:
    return Column("arm", [row.arm for row in comparison.rows], "left")


def _failed(num_cells: int) -> list[str]:
    return ["failed", *[readable.MISSING] * (num_cells - 1)]
