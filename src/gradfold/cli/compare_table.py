"""The tables of a comparison in a terminal, and what they show in plain words below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradfold.compare import readable
from gradfold.compare.report import metric_names
from gradfold.compare.results import Comparison, Row
from gradfold.compare.verdict import verdict
from gradfold.memory.amount import written

__all__: list[str] = []

_WIDTH = 100
_NUM_METRICS = 2  # that fit beside the rest; the report has all


def wide_enough(console: Console) -> Console:
    """The console, with the width that the tables need where it is no terminal and rich assumes 80 columns."""
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def print_comparison(comparison: Comparison, written: Sequence[Path]) -> None:
    """Print a comparison on standard output."""
    console = wide_enough(Console(highlight=False))
    console.print(_heading(comparison))
    console.print(_sameness(comparison))
    console.print(_costs(comparison))
    console.print()
    for sentence in verdict(comparison):
        console.print(_bullet(sentence))
    if written:
        report = next(path for path in written if path.suffix == ".html")
        console.print(Text(f"\nReport: {report} (with {len(written) - 1} files beside it)"))


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


def _sameness(comparison: Comparison) -> Table:
    """How far each arm is from the full batch."""
    metrics = metric_names(comparison)[:_NUM_METRICS]
    has_last_window = bool(comparison.sizes.last_window)
    headings = [f"first\ngradient\n{comparison.first_gradients_in}", "first\ngradient\nfloat64"]
    headings += ["last\nwindow\nfloat64"] * has_last_window + ["final\nweights", "training\nloss"]
    headings += [f"held-out\n{name.replace('_', ' ')}" for name in metrics] + ["updates"]
    table = _table("Distance from the full batch", headings)
    for row in comparison.rows:
        table.add_row(row.arm, *_sameness_cells(row, has_last_window, metrics, len(headings)))
    return table


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


def _costs(comparison: Comparison) -> Table:
    """What each arm costs; the report has more."""
    headings = [
        "samples/s",
        "total",
        "forward",
        "backward",
        "update",
        "other",
        "memory\nadded",
        "peak of\ntensors",
    ]
    table = _table("Cost", headings)
    for row in comparison.rows:
        if row.measured is None:
            table.add_row(row.arm, *_failed(len(headings)))
            continue
        seconds, memory, tracked = row.measured.seconds, row.measured.memory, row.measured.tracked
        spent = (seconds.total, seconds.forward, seconds.backward, seconds.update, seconds.other)
        table.add_row(
            row.arm,
            readable.number(row.measured.samples_per_s),
            *map(readable.seconds, spent),
            written(memory.rise_bytes),
            readable.MISSING if tracked is None else written(tracked.peak_bytes),
        )
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False
    )
    table.add_column("arm", no_wrap=True, vertical="bottom")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _failed(num_cells: int) -> list[str]:
    return ["failed", *[readable.MISSING] * (num_cells - 1)]
