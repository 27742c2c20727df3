"""The command `gradfold verify`."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import typer
from rich.padding import Padding
from rich.text import Text

import gradfold.cli.options as options
from gradfold.cli.tables import output_console, print_words
from gradfold.compare.data import first_global_batch, take_own
from gradfold.distributed.launch import find_rank_info, in_parallel, is_first, launched_process_group
from gradfold.errors import OptionError
from gradfold.verification.verdict import Verdict
from gradfold.verification.verify import verify as prove
from gradfold.weights import WeightOption, token_count
from gradfold.workloads import registry
from gradfold.workloads.workload import Workload

EPILOG = """
**Examples**

`gradfold verify digits` — exact: the gradient is the whole batch's to 16 digits

`gradfold verify resnet` — not exact: names the BatchNorm layers, and how far off they are

`gradfold verify resnet --batch-norm exact` — exact: normalized by the whole batch

`gradfold verify encoder --weight samples` — a mean over tokens, weighted by samples: names the right weight

`gradfold verify digits --global-batch 32 --micro-batch 1,5,16 --json` — custom sizes, for a program to read

`gradfold verify train.py:workload` — a custom model: a function that returns a gradfold.Workload

`gradfold verify encoder --nproc 2` — in two processes, too; the same as `torchrun --nproc-per-node 2 -m gradfold ...`

In Python: `print(gradfold.verify(accumulator, batch))`

Exit codes: 0 exact, 1 not exact or inconclusive, 2 wrong usage.
"""


def verify(
    workload: options.WorkloadArgument,
    data: options.DataOption = None,
    global_batch: options.GlobalBatchOption = None,
    micro_batch: Annotated[
        list[str] | None,
        typer.Option(
            help="Micro-batch sizes to try: 1,5,16, or the option several times. "
            "[default: a few, including the workload's]",
            metavar="SIZES",
        ),
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(
            help="What the loss is a mean over: samples, or tokens:KEY with the key or index of the labels in a batch; "
            "or sum, where losses add up. [default: the workload's]",
            metavar="samples|tokens:KEY|sum",
        ),
    ] = None,
    batch_norm: Annotated[
        Literal["exact", "per_micro_batch", "refuse"] | None,
        typer.Option(
            help="What BatchNorm normalizes by: exact (the whole batch), per_micro_batch, or refuse (names the "
            "layers). [default: the workload's]",
            metavar="HOW",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float64", "float32"],
        typer.Option(help="Precision of the copy that is run; in float64 rounding hides nothing."),
    ] = "float64",
    seed: options.SeedOption = 0,
    nproc: options.ProcessesOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Prove that a workload's accumulated gradient is the whole batch's, or name the cause.

    One batch runs at once in plain torch, and in micro-batches of several sizes by gradfold, in a copy of the model in
    float64. Where the gradients differ, experiments find the cause: weights that count the wrong thing, samples that
    depend on each other and the layer where they do, BatchNorm, sums, state, random numbers.

    With --nproc 2 (or under torchrun) several processes also accumulate together, each with its part of the batch, and
    their gradient is compared with that of one process with the whole batch.
    """
    options.launch_ranks(nproc)
    sizes = _sizes(micro_batch) if micro_batch else None
    changes: dict[str, Any] = {} if weight is None else {"weight": _weight(weight)}
    if batch_norm is not None:
        changes["batch_norm"] = None if batch_norm == "refuse" else batch_norm
    if not 0 <= seed < 2**32:
        raise OptionError(f"--seed {seed}: expected a number from 0 to 2**32 - 1.")
    chosen = replace(registry.load(workload, data), **changes)
    with nullcontext() if find_rank_info() is None else launched_process_group() as group:
        num_ranks = 1 if group is None else group.size
        rows = first_global_batch(chosen, global_batch, least=max(2, num_ranks), seed=seed)
        torch.manual_seed(seed)
        model = chosen.make_model()
        accumulator = chosen.make_accumulator(
            model if group is None else in_parallel(model),
            micro_batch_size=min(chosen.micro_batch_size, -(-len(rows) // num_ranks)),
        )
        batch = take_own(chosen, rows, group)
        verdict = prove(accumulator, batch, dtype=getattr(torch, dtype), micro_batch_sizes=sizes)
    if not is_first():
        return
    if as_json:
        options.print_json({"workload": chosen.name, "seed": seed, **verdict.to_dict()})
    else:
        _print(chosen, verdict)
    if not verdict.ok:
        raise typer.Exit(1)


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
    if text == "sum":
        return "sum"
    if kind == "tokens" and key:
        return token_count(int(key) if key.isdecimal() else key)
    raise OptionError(
        f"--weight {text}: expected samples, or tokens:KEY with the key or index of the labels in a batch, such as "
        "tokens:labels or tokens:1; or sum."
    )


def _print(workload: Workload, verdict: Verdict) -> None:
    console = output_console()
    console.print(Text.assemble((workload.name, "bold"), f": {workload.description}\n"))
    console.print(Text(verdict.headline, style="bold green" if verdict.ok else "bold red"))
    for cause in verdict.causes:
        console.print(Text(f"\nCause: {cause.name}", style="bold"))
        console.print(Padding(Text(cause.text), (0, 0, 0, 2)))
    for note in verdict.notes:
        console.print(Padding(Text(f"Note: {note}"), (1, 0, 0, 0)))
    if verdict.sizes:
        print_words(console, "\nBy size", ["micro-batch", "how many", "error"], [row.cells() for row in verdict.sizes])
    if not math.isnan(verdict.noise_floor):
        console.print(Text(f"\n{verdict.precision_line}", style="dim"))
    if verdict.rows:
        print_words(
            console, "\nBy parameter", ["name", "shape", "norm", "error"], [row.cells() for row in verdict.worst]
        )
        if verdict.num_hidden:
            console.print(Text(f"and {verdict.num_hidden} more with smaller errors", style="dim"))
