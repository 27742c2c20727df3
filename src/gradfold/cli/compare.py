"""The command `gradfold compare`."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradfold.cli.launch import launch_ranks
from gradfold.cli.tables import print_comparison, showing_progress
from gradfold.compare.arms import DEFAULT_ARMS, EXACT_BATCH_NORM, GROUP_NORM_ARMS, TOKEN_BUDGET
from gradfold.compare.report import make_folder, write_report
from gradfold.compare.results import Comparison
from gradfold.compare.runner import accompany
from gradfold.compare.runner import compare as run_comparison
from gradfold.compare.settings import Settings
from gradfold.distributed.launch import INTERRUPTED, find_rank_info, meeting
from gradfold.errors import OptionError

__all__: list[str] = []

_OF_BATCH_NORM = ", ".join((EXACT_BATCH_NORM, *GROUP_NORM_ARMS))
_DEFAULT_ARMS = f"{', '.join(DEFAULT_ARMS)}; in resnet also {_OF_BATCH_NORM}, in texts {TOKEN_BUDGET}"

EPILOG = """
**Examples**

`gradfold compare` — the digits that come with scikit-learn, in seconds

`gradfold compare digits --global-batch 256 --micro-batch 8 --out out/` — with a report in out/report.html

`gradfold compare mnist --data DIR --epochs 2` — files that you have; without --data they are downloaded

`gradfold compare encoder --arms full-batch,gradfold --json` — two of the four ways, for a program to read

`gradfold compare mnist --data DIR --micro-batch auto` — gradfold finds its micro-batch, in seconds

`gradfold compare resnet` — what micro-batches do to BatchNorm, and neither to exact BatchNorm nor to GroupNorm

`gradfold compare language-model` — the same training in a fraction of the time, with rows of like length together

`gradfold compare cifar10 --data DIR --precision bf16` — is accumulation faster here, or bfloat16, or both?

`gradfold compare encoder --nproc 2` — shared by two processes, as by `torchrun --nproc-per-node 2 -m gradfold compare`

`gradfold compare train.py:workload` — your own model: a function that returns a gradfold.Workload

Exit codes: 0 fine, 1 an arm failed, 2 wrong usage.
"""


def compare(
    workload: Annotated[
        str, typer.Argument(help="A built-in name (see gradfold workloads), module:callable or path.py:callable.")
    ] = "digits",
    global_batch: Annotated[int | None, typer.Option(help="Samples of one update. [default: the workload's]")] = None,
    micro_batch: Annotated[
        str | None,
        typer.Option(
            help="Samples that are run at once; auto: gradfold finds the fastest, the other arms keep the workload's. "
            "[default: the workload's]",
            metavar="N|auto",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data. [default: the workload's]")] = None,
    seed: Annotated[int, typer.Option(help="Draws the first weights and the order of samples.")] = 0,
    arms: Annotated[
        str | None,
        typer.Option(
            help=f"Which arms, in which order, with commas between. [default: {_DEFAULT_ARMS}]", metavar="ARMS"
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Add the full batch and gradfold in a lower precision: bf16 (autocast) or fp16 (and a loss scaler).",
            metavar="[bf16|fp16]",
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with the workload's data files.", metavar="DIR")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write report.html, results.json and plots into this folder.", metavar="DIR")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch in each arm. [default: torch's]")] = None,
    nproc: Annotated[
        int | None,
        typer.Option(help="Share each global batch among this many processes (DistributedDataParallel).", min=1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
) -> None:
    """Train one model with and without gradient accumulation, and compare.

    The same model is trained from the same start on the same samples in the same order by several **arms**, each in a
    process of its own:

    - **full-batch**: the reference, each global batch at once, in plain torch

    - **gradfold**: each global batch in micro-batches, by gradfold

    - **token-budget** (where rows differ in length, as in language-model): by gradfold, in micro-batches of rows of
    like length, which are hardly padded

    - **plain-loop**: the loop as articles print it: loss / n, a step every n micro-batches

    - **small-batch**: no accumulation, an update for every micro-batch

    - **reordered** (only when asked for): the full batch with its rows in reverse. Rounding grows while a network
      trains; this shows how far it goes by itself

    - **batch-norm-exact** (where BatchNorm sees micro-batches, as in resnet): the workload's own model by gradfold with
    batch_norm="exact", which is the full batch

    - **batch-norm-per-micro** (in the place of gradfold where BatchNorm sees micro-batches, as in resnet): the
      workload's own model by gradfold, which is not the full batch

    - **group-norm-full-batch** and **group-norm** (where BatchNorm sees micro-batches, as in resnet): another model,
    with GroupNorm in place of BatchNorm, in full batches and by gradfold. The second is measured against the first

    - **full-batch-bf16** and **gradfold-bf16**, **full-batch-fp16** and **gradfold-fp16** (with --precision): the full
    batch in the mixed-precision recipe of plain torch, and both: accumulation and lower precision, by gradfold. With
    forward and backward seconds side by side you see which of accumulation, lower precision or both is faster on this
    machine. A processor without matrix units for bfloat16 or float16 takes longer with them, and that is the finding

    With --nproc 2 (or under torchrun) the arms with micro-batches run in several processes under
    DistributedDataParallel, each with its share of every global batch; the full batch stays in one, as the reference.

    You see how far each arm's gradient and weights end from the full batch's, its loss and accuracy, and what it costs
    in time and memory. An arm that fails or does not fit says so, and the others still run.
    """
    launch_ranks(nproc)
    place = find_rank_info()
    settings = Settings(
        workload=workload,
        data=data,
        global_batch_size=global_batch,
        micro_batch_size=None if micro_batch in (None, "auto") else _number(micro_batch),
        chooses_micro_batch=micro_batch == "auto",
        num_epochs=epochs,
        seed=seed,
        arms=None if arms is None else tuple(name.strip() for name in arms.split(",") if name.strip()),
        num_threads=threads,
        precision=precision,
        num_ranks=1 if place is None else place.size,
    )
    if place is not None and place.rank > 0:
        with meeting() as ranks:
            accompany(settings, ranks)
        return
    if out is not None:
        make_folder(out)
    comparison = _run(settings)
    written = [] if out is None else write_report(comparison, out)
    if as_json:
        print(json.dumps(comparison.to_json(), indent=1, allow_nan=False))
    else:
        print_comparison(comparison, written)
    if comparison.has_failures:
        raise typer.Exit(1)


def _number(text: str) -> int:
    if not text.lstrip("-").isdecimal():
        raise OptionError(f"--micro-batch {text}: expected the number of samples to run at once, or auto.")
    return int(text)


def _run(settings: Settings) -> Comparison:
    console = Console(stderr=True)
    try:
        with (
            showing_progress(console) as on_progress,
            nullcontext() if settings.num_ranks == 1 else meeting() as ranks,
        ):
            command_line = shlex.join(["gradfold", *sys.argv[1:]])
            return run_comparison(settings, on_progress=on_progress, command_line=command_line, ranks=ranks)
    except KeyboardInterrupt:
        print("gradfold: interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
