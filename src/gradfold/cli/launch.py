"""Several processes for a command: `--nproc N` runs it again, in N processes at once."""

from __future__ import annotations

import sys

import typer

from gradfold.distributed.launch import find_rank_info, launch
from gradfold.errors import OptionError


def launch_ranks(num_ranks: int | None) -> None:
    """Where several processes are asked for, run this command in them and exit as they do; else return.

    Raises:
        OptionError: this process is one of several already.
    """
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
    kept = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--nproc":
            next(rest, None)
        elif not argument.startswith("--nproc="):
            kept.append(argument)
    return kept
