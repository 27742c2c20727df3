"""The command `gradfold workloads`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gradfold.cli.tables import wide_enough
from gradfold.workloads import registry

__all__: list[str] = []


def workloads(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the built-in workloads: what `gradfold compare` can train.

    A workload of your own is a function that returns a `gradfold.Workload`; name it as `module:callable` or
    `path.py:callable`.
    """
    descriptions = registry.describe()
    if as_json:
        listed = [{"name": one.name, "description": one.text, "data": one.data} for one in descriptions]
        print(json.dumps(listed, indent=1))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), header_style="bold")
    for heading in ("workload", "what it trains", "data"):
        table.add_column(heading, no_wrap=heading == "workload")
    for one in descriptions:
        table.add_row(one.name, one.text, one.data)
    console = wide_enough(Console(highlight=False))
    console.print(table)
    console.print("\nYour own: a function that returns a gradfold.Workload, as module:callable or path.py:callable.")
