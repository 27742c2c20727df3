"""The command `gradfold compare`."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import gradfold.cli.options as options
from gradfold.cli.tables import print_comparison, showing_progress
from gradfold.compare.arms import ARMS, CONTROL, DEFAULT_ARMS, Arm
from gradfold.compare.report import make_folder, results_json, write_page, write_results
from gradfold.compare.runner import accompany
from gradfold.compare.runner import compare as run_comparison
from gradfold.compare.settings import Settings
from gradfold.distributed.launch import find_rank_info, launched_process_group
from gradfold.errors import OptionError
from gradfold.messages import first_line

_NAMES = f"{', '.join(DEFAULT_ARMS)}, and what the workload's batch_norm or token_budget adds"
_WHERE = {
    None: "",
    "batch_norm": " (where BatchNorm normalizes by micro-batch, as in resnet)",
    "token_budget": " (where samples differ in length, as in language-model)",
}


def _listed(arm: Arm) -> str:
    """An arm in the list of the help text."""
    where = f" (with --precision {arm.precision})" if arm.precision else _WHERE[arm.requires]
    return f"- **{arm.name}**{' (only when named)' if arm.name == CONTROL else where}: {arm.description}"


_ARMS = "\n\n".join(map(_listed, ARMS.values()))

HELP = f"""Train one model with and without gradient accumulation, and compare.

The same model is trained from the same start on the same samples in the same order by several **arms**, each in a
process of its own:

{_ARMS}

With --precision, forward and backward seconds side by side show whether accumulation, lower precision or both is faster
on this machine. A processor without matrix units for bfloat16 or float16 takes longer with them.

With --nproc 2 (or under torchrun) the arms with micro-batches run in several processes under DistributedDataParallel,
each with its part of every global batch; the full batch stays in one, as the reference.

The tables show how far each arm's gradient and weights end from the full batch's, its loss and accuracy, and what it
costs in time and memory. An arm that fails or does not fit says so, and the others still run.
"""

EPILOG = """
**Examples**

`gradfold compare` — the digits that come with scikit-learn, in seconds

`gradfold compare digits --global-batch 256 --micro-batch 8 --out out/` — with a report in out/report.html

`gradfold compare mnist --data DIR --epochs 2` — local files; without --data they are downloaded

`gradfold compare encoder --arms full-batch,gradfold --json` — two of the four arms, for a program to read

`gradfold compare mnist --data DIR --micro-batch auto` — gradfold tunes its micro-batch size, in seconds

`gradfold compare resnet` — BatchNorm by micro-batch, exact BatchNorm and GroupNorm

`gradfold compare language-model` — with a token budget, the same training in a fraction of the time

`gradfold compare cifar10 --data DIR --precision bf16` — is accumulation faster here, or bfloat16, or both?

`gradfold compare encoder --nproc 2` — in two processes, as by `torchrun --nproc-per-node 2 -m gradfold compare`

`gradfold compare train.py:workload` — a custom model: a function that returns a gradfold.Workload

Exit codes: 0 fine, 1 an arm failed, 2 wrong usage.
"""


def compare(
    workload: options.WorkloadArgument = "digits",
    global_batch: options.GlobalBatchOption = None,
    micro_batch: Annotated[
        str | None,
        typer.Option(
            help="Samples that are run at once; auto: gradfold tunes it, the other arms keep the workload's. "
            "[default: the workload's]",
            metavar="N|auto",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data. [default: the workload's]")] = None,
    seed: options.SeedOption = 0,
    arms: Annotated[
        str | None,
        typer.Option(help=f"Which arms, in which order, separated by commas. [default: {_NAMES}]", metavar="ARMS"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Add the full batch and gradfold in a lower precision: bf16 (autocast) or fp16 (and a loss scaler).",
            metavar="[bf16|fp16]",
        ),
    ] = None,
    data: options.DataOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Write report.html, results.json and figures into this folder.", metavar="DIR")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch in each arm. [default: torch's]")] = None,
    nproc: options.ProcessesOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Run the command; `HELP` says what it does."""
    options.launch_ranks(nproc)
    rank_info = find_rank_info()
    settings = Settings(
        workload=workload,
        data=data,
        global_batch_size=global_batch,
        micro_batch_size=None if micro_batch in (None, "auto") else _number(micro_batch),
        tunes_micro_batch=micro_batch == "auto",
        num_epochs=epochs,
        seed=seed,
        arms=None if arms is None else tuple(name.strip() for name in arms.split(",") if name.strip()),
        num_threads=threads,
        precision=precision,
        num_ranks=1 if rank_info is None else rank_info.size,
    )
    if rank_info is not None and rank_info.rank > 0:
        with launched_process_group() as group:
            accompany(settings, group)
        return
    if out is not None:
        make_folder(out)
    with (
        showing_progress(Console(stderr=True)) as on_progress,
        nullcontext() if settings.num_ranks == 1 else launched_process_group() as group,
    ):
        command_line = shlex.join(["gradfold", *sys.argv[1:]])
        comparison = run_comparison(settings, on_progress=on_progress, command_line=command_line, group=group)
    files: list[Path] = []
    failure = ""
    if out is not None:
        try:
            for write in (write_results, write_page):
                files += write(comparison, out)
        except Exception as error:  # whatever it is, what was trained is printed
            failure = f"gradfold: --out {out}: the report is incomplete: {first_line(error)}"
    if as_json:
        print(results_json(comparison))
    else:
        print_comparison(comparison, files)
    if failure:
        print(failure, file=sys.stderr)
    if failure or comparison.has_failures:
        raise typer.Exit(1)


def _number(text: str) -> int:
    if not text.lstrip("-").isdecimal():
        raise OptionError(f"--micro-batch {text}: expected the number of samples to run at once, or auto.")
    return int(text)
