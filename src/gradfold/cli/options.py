"""Arguments and options that several commands share, and what follows from them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from gradfold.distributed.launch import INTERRUPTED, find_rank_info, launch
from gradfold.errors import OptionError

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


@contextmanager
def interruptible() -> Iterator[None]:
    """On Ctrl-C the command ends with one line."""
    try:
        yield
    except KeyboardInterrupt:
        print("gradfold: interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


def launch_ranks(num_ranks: int | None) -> None:
    """Where `--nproc` asks for several processes, run this command in them and exit as they do; else return."""
    if num_ranks is None:
        return
    if find_rank_info() is not None:
        raise OptionError(
            f"--nproc {num_ranks} under torchrun, which has started several processes already. Leave --nproc out."
        )
    if num_ranks > 1:
        raise typer.Exit(launch(["-m", "gradfold", *without_nproc(sys.argv[1:])], num_ranks))


def without_nproc(arguments: list[str]) -> list[str]:
    """The arguments without `--nproc N` and `--nproc=N`."""
    before = ["", *arguments]
    kept = zip(before, arguments, strict=False)
    return [one for previous, one in kept if "--nproc" not in (previous, one) and not one.startswith("--nproc=")]
