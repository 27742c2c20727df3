"""The tables of a comparison in a terminal, and what they show in plain words below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradfold.cli.wide_table import Column, columns_of, print_wide, wide_enough
from gradfold.compare import readable
from gradfold.compare.report import metric_names
from gradfold.compare.results import Comparison, Row
from gradfold.compare.verdict import verdict
from gradfold.memory.amount import written

__all__: list[str] = []


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
