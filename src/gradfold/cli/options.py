"""Arguments and options that several commands share, and what follows from them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from gradfold.distributed.launch import INTERRUPTED, find_rank_info, is_first, launch
from gradfold.errors import OptionError, WorkloadError
from gradfold.workloads.registry import describe_cause

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

_MOST_PROCESSES = 64  # on a machine with fewer cores; each takes seconds and hundreds of MiB to start


def print_json(value: Any) -> None:
    """Print a result for a program to read."""
    print(json.dumps(value, indent=1, allow_nan=False))


@contextmanager
def ending_by_name() -> Iterator[None]:
    """Decorates a command: Ctrl-C ends it with one line, and `sys.exit` in the user's code with a `WorkloadError`."""
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would end Python's own end, with another code
        if is_first():
            print("gradfold: interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except SystemExit as error:  # typer's own ends are not of this class
        raise WorkloadError(f"the workload ended the program: {describe_cause(error)}") from error


def launch_ranks(num_ranks: int | None) -> None:
    """Where `--nproc` asks for several processes, run this command in them and exit as they do; else return."""
    if num_ranks is None:
        return
    if find_rank_info() is not None:
        raise OptionError(
            f"--nproc {num_ranks} under torchrun, which has started several processes already. Leave --nproc out."
        )
    most = max(_MOST_PROCESSES, os.cpu_count() or 1)
    if num_ranks > most:
        raise OptionError(f"--nproc {num_ranks}: expected at most {most} processes on this machine.")
    if num_ranks > 1:
        raise typer.Exit(launch(["-m", "gradfold", *without_nproc(sys.argv[1:])], num_ranks))


def without_nproc(arguments: list[str]) -> list[str]:
    """The arguments without `--nproc N` and `--nproc=N`."""
    before = ["", *arguments]
    kept = zip(before, arguments, strict=False)
    return [one for previous, one in kept if "--nproc" not in (previous, one) and not one.startswith("--nproc=")]
