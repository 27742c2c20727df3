"""Arguments and options that several commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

WorkloadArgument = Annotated[
    str, typer.Argument(help="A built-in name (see gradfold workloads), module:callable or path.py:callable.")
]
DataOption = Annotated[Path | None, typer.Option(help="Folder with the workload's data files.", metavar="DIR")]
GlobalBatchOption = Annotated[int | None, typer.Option(help="Samples of one update. [default: the workload's]")]
SeedOption = Annotated[int, typer.Option(help="Draws the first weights and the order of samples.")]
ProcessesOption = Annotated[
    int | None,
    typer.Option(help="Share each global batch among this many processes (DistributedDataParallel).", min=1),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


def print_json(value: Any) -> None:
    """Print a result for a program to read."""
    print(json.dumps(value, indent=1, allow_nan=False))
