"""The progress of a comparison: a line per arm on a terminal's standard error, and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from gradfold.compare.readable import number
from gradfold.compare.run import OnProgress, Progress

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
