"""The command `gradfold verify`."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradfold.accumulator import Accumulator
from gradfold.batchnorm.per_micro_batch import BatchNormOption
from gradfold.cli.launch import launch_ranks
from gradfold.cli.tables import wide_enough
from gradfold.compare.data import epoch_order, num_samples, share, take
from gradfold.distributed.launch import find_rank_info, in_parallel, is_first, meeting
from gradfold.distributed.process_group import ProcessGroup
from gradfold.errors import OptionError
from gradfold.verification.verdict import Verdict
from gradfold.verification.verify import verify as prove
from gradfold.weights import WeightOption, token_count
from gradfold.workloads import registry
from gradfold.workloads.workload import Workload

__all__: list[str] = []

EPILOG = """
**Examples**

`gradfold verify digits` — holds: the gradient is the whole batch's to 16 digits

`gradfold verify resnet` — does not: names the BatchNorm layers, and how far off they are

`gradfold verify resnet --batch-norm exact` — holds: normalized by the whole batch, in lock-step

`gradfold verify encoder --weight samples` — a mean over tokens, weighted by samples: names the weight that fits

`gradfold verify digits --global-batch 32 --micro-batch 1,5,16 --json` — sizes of your own, for a program to read

`gradfold verify train.py:workload` — your own model: a function that returns a gradfold.Workload

`gradfold verify encoder --nproc 2` — by two processes, too; the same as `torchrun --nproc-per-node 2 -m gradfold ...`

In Python: `print(gradfold.verify(accumulator, batch))`

Exit codes: 0 the law holds, 1 it does not or could not be proved, 2 wrong usage.
"""


class PrecisionName(str, Enum):
    """What the copy of the model is run in."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"


class BatchNormName(str, Enum):
    """What BatchNorm layers normalize by."""

    EXACT = "exact"
    PER_MICRO_BATCH = "per_micro_batch"
    REFUSE = "refuse"


def verify(
    workload: Annotated[
        str, typer.Argument(help="A built-in name (see gradfold workloads), module:callable or path.py:callable.")
    ],
    data: Annotated[Path | None, typer.Option(help="Folder with the workload's data files.", metavar="DIR")] = None,
    global_batch: Annotated[int | None, typer.Option(help="Samples of the batch. [default: the workload's]")] = None,
    micro_batch: Annotated[
        list[str] | None,
        typer.Option(
            help="Sizes of micro-batches to try: 1,5,16, or the option several times. "
            "[default: a few, the workload's among them]",
            metavar="SIZES",
        ),
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(
            help="What the loss is a mean over: samples, or tokens:KEY with the key or index of the labels in a batch. "
            "[default: the workload's]",
            metavar="samples|tokens:KEY",
        ),
    ] = None,
    batch_norm: Annotated[
        BatchNormName | None,
        typer.Option(
            help="What BatchNorm normalizes by: exact (the whole batch), per_micro_batch, or refuse (names the "
            "layers). [default: the workload's]",
            metavar="HOW",
        ),
    ] = None,
    dtype: Annotated[
        PrecisionName, typer.Option(help="Precision of the copy that is run; in float64 rounding hides nothing.")
    ] = PrecisionName.FLOAT64,
    seed: Annotated[int, typer.Option(help="Draws the weights and the samples of the batch.")] = 0,
    nproc: Annotated[
        int | None,
        typer.Option(help="Share the batch among this many processes (DistributedDataParallel), too.", min=1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON, and nothing else.")] = False,
) -> None:
    """Prove that a workload's accumulated gradient is the whole batch's, or name the cause.

    One batch runs at once in plain torch, and in micro-batches of several sizes by gradfold, in a copy of the model in
    float64. Where the gradients differ, experiments tell why: weights that count the wrong thing, samples that depend
    on each other and the layer where they do, BatchNorm, sums, state, random numbers.

    With --nproc 2 (or under torchrun) several processes accumulate together as well, each with its share of the batch,
    and their gradient is held against that of one process with the whole of it.
    """
    launch_ranks(nproc)
    sizes = None if not micro_batch else _sizes(micro_batch)
    option = None if weight is None else _weight(weight)
    if not 0 <= seed < 2**32:
        raise OptionError(f"--seed {seed}: expected a number from 0 to 2**32 - 1.")
    chosen = registry.load(workload, data)
    if option is not None:
        chosen = replace(chosen, weight=option)
    if batch_norm is not None:
        chosen = replace(chosen, batch_norm=_OPTIONS[batch_norm])
    with nullcontext() if find_rank_info() is None else meeting() as ranks:
        verdict = _prove(chosen, global_batch, sizes, dtype, seed, ranks)
    if not is_first():
        return
    if as_json:
        print(json.dumps({"workload": chosen.name, "seed": seed, **verdict.to_dict()}, indent=1, allow_nan=False))
    else:
        _print(chosen, verdict)
    if not verdict.ok:
        raise typer.Exit(1)


_OPTIONS: dict[BatchNormName, BatchNormOption] = {
    BatchNormName.EXACT: "exact",
    BatchNormName.PER_MICRO_BATCH: "per_micro_batch",
    BatchNormName.REFUSE: None,
}


def _sizes(texts: list[str]) -> list[int]:
    parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not part.isdecimal() or int(part) < 1]
    if wrong or not parts:
        raise OptionError(f"--micro-batch {','.join(texts)}: expected whole numbers of at least 1, such as 1,5,16.")
    return list(map(int, parts))


def _weight(text: str) -> WeightOption:
    kind, _, key = text.partition(":")
    if text == "samples":
        return "samples"
    if kind == "tokens" and key:
        return token_count(int(key) if key.isdecimal() else key)
    raise OptionError(
        f"--weight {text}: expected samples, or tokens:KEY with the key or index of the labels in a batch, such as "
        "tokens:labels or tokens:1."
    )


def _prove(
    workload: Workload,
    global_batch: int | None,
    sizes: list[int] | None,
    dtype: PrecisionName,
    seed: int,
    ranks: ProcessGroup | None,
) -> Verdict:
    total = num_samples(workload)
    size = workload.global_batch_size if global_batch is None else global_batch
    num_ranks = 1 if ranks is None else ranks.size
    if not max(2, num_ranks) <= size <= total:
        raise OptionError(
            f"--global-batch {size}: expected {max(2, num_ranks)} to {total} samples, which is what workload "
            f"{workload.name!r} has."
        )
    torch.manual_seed(seed)
    model = workload.make_model()
    accumulator = Accumulator(
        model if ranks is None else in_parallel(model),
        workload.loss_fn,
        micro_batch_size=min(workload.micro_batch_size, -(-size // num_ranks)),
        weight=workload.weight,
        collate=workload.collate,
        batch_norm=workload.batch_norm,
    )
    rows = epoch_order(total, seed, 0, workload.shuffle)[:size]
    batch = take(workload, rows if ranks is None else share(rows, ranks.rank, ranks.size))
    return prove(accumulator, batch, dtype=getattr(torch, dtype.value), micro_batch_sizes=sizes)


def _print(workload: Workload, verdict: Verdict) -> None:
    console = wide_enough(Console(highlight=False))
    console.print(Text.assemble((workload.name, "bold"), f": {workload.description}\n"))
    console.print(Text(verdict.headline, style="bold green" if verdict.ok else "bold red"))
    for cause in verdict.causes:
        console.print(Text(f"\nCause: {cause.name}", style="bold"))
        console.print(Padding(Text(cause.text), (0, 0, 0, 2)))
    for note in verdict.notes:
        console.print(Padding(Text(f"Note: {note}"), (1, 0, 0, 0)))
    if verdict.sizes:
        console.print(_table("\nBy size", ["micro-batch", "how many", "error"], verdict.size_cells()))
    if not math.isnan(verdict.noise_floor):
        console.print(Text(f"\n{verdict.precision_line}", style="dim"))
    if verdict.rows:
        console.print(_table("\nBy parameter", ["name", "shape", "norm", "error"], verdict.parameter_cells()))
        if verdict.num_hidden:
            console.print(Text(f"and {verdict.num_hidden} more with smaller errors", style="dim"))


def _table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
