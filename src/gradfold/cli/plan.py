"""The command `gradfold plan`."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from gradfold.cli.options import DataOption, GlobalBatchOption, JsonOption, WorkloadArgument, print_json
from gradfold.cli.tables import output_console, print_wide
from gradfold.compare.data import first_global_batch, take
from gradfold.compare.summary import Column
from gradfold.distributed.fsdp import shard
from gradfold.distributed.launch import fake_process_group
from gradfold.memory.budget import read_bytes, written
from gradfold.memory.plan import Plan, PlanRow, longest_list
from gradfold.memory.plan import plan as make_plan
from gradfold.workloads import registry
from gradfold.workloads.workload import Workload

EPILOG = """
**Examples**

`gradfold plan mnist --memory 1GiB` — all of the workload's global batch fits at once

`gradfold plan cifar10 --memory 4GiB --global-batch 50000` — a batch of the whole data set: which micro-batch?

`gradfold plan resnet --memory 16GiB --global-batch 1433 --device cuda` — for a GPU that this machine does not have

`gradfold plan encoder --memory 700MiB --global-batch 1024 --fully-shard 8` — for one of eight processes

`gradfold plan encoder --memory 850MiB --global-batch 1024 --json` — for a program to read

`gradfold plan train.py:workload --memory 16GiB` — a custom model: a function that returns a gradfold.Workload

In Python: `print(gradfold.plan(accumulator, batch, optimizer, memory="16GiB"))`

Exit codes: 0 a micro-batch fits, 1 not even one sample fits, 2 wrong usage.
"""


def plan(
    workload: WorkloadArgument,
    memory: Annotated[
        str, typer.Option(help="Memory budget of the process or device: 16GiB, 512MiB, ...", metavar="SIZE")
    ],
    global_batch: GlobalBatchOption = None,
    device: Annotated[
        str | None, typer.Option(help="Plan for cpu or cuda, present or not. [default: the model's]", metavar="DEVICE")
    ] = None,
    fully_shard: Annotated[
        int, typer.Option(min=1, help="Plan for one of N processes that share parameters and batch.", metavar="N")
    ] = 1,
    margin: Annotated[float, typer.Option(help="Fraction that is added to predictions.")] = 0.1,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Predict which micro-batch of a workload fits into memory, before it is run.

    A window and an update run on **fake tensors**, which need no memory, at two small sizes; the peak of every size
    follows from these in about a second. The table shows it by size, with what it consists of:

    - **parameters**, **gradients**, **optimizer state**, **inputs**: in memory nearly all the time

    - **saved activations**: what the forward pass keeps for the backward pass

    - **temporaries**: everything else at that moment

    - **with margin**: the peak and a margin for what cannot be predicted, which is named below the table

    Where the budget is short, a second table shows what checkpointing, a lower precision and other memory savings
    would allow. Recurrent models, and models that do not run on fake tensors, run on a few real samples instead.

    With `--fully-shard N` the plan is for one of N processes that share parameters, gradients and optimizer state
    (FSDP2: each layer of the longest list is sharded, then the model). Each has an N-th of the batch.
    """
    read_bytes(memory)  # before anything is loaded
    chosen = registry.load(workload, data)
    order = first_global_batch(chosen, global_batch, least=fully_shard)
    order = order[: -(-len(order) // fully_shard)]  # of one process
    with nullcontext() if fully_shard == 1 else fake_process_group(fully_shard), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which is not written to here
        torch.manual_seed(0)
        model = chosen.make_model()
        if fully_shard > 1:
            shard(model, longest_list(model))
        accumulator, optimizer = chosen.make_accumulator(model), chosen.make_optimizer(model.parameters())
        batch = take(chosen, order)
        found = make_plan(accumulator, batch, optimizer, memory=memory, device=device, margin=margin)
    if as_json:
        print_json({"workload": chosen.name, "num_processes": fully_shard, **found.to_json()})
    else:
        _print(chosen, found, fully_shard)


def _print(workload: Workload, found: Plan, num_processes: int) -> None:
    console = output_console()
    console.print(Text.assemble((workload.name, "bold"), f": {workload.description}"))
    budget = written(found.budget_bytes)
    of_one = "global batch" if num_processes == 1 else f"one of {num_processes} processes, its part of the global batch"
    console.print(Text(f"{of_one} {found.num_rows:,}, budget {budget}, on {found.device}", style="dim"))
    _print_table(console, "\nPredicted peak", [row for row in found.rows if not row.saving], found.choice)
    savings = [row for row in found.rows if row.saving]
    if savings:
        _print_table(console, "\nWhat would change it", savings, found.choice)
        console.print()
        for row in savings:
            console.print(Padding(Text(f"{row.saving}: {row.cost}", style="dim"), (0, 0, 0, 2)))
    choice = found.choice
    many = choice.num_micro_batches
    updates = "the whole batch at once" if many == 1 else f"{many:,} to an update"
    console.print(Text(f"\nMicro-batch {choice.micro_batch_size:,}: {updates}.", style="bold green"))
    for note in found.notes:
        console.print(Text(note, style="dim"))


def _print_table(console: Console, title: str, rows: list[PlanRow], choice: PlanRow) -> None:
    sizes = [
        Column("micro-\nbatch", [f"{row.micro_batch_size:,}" for row in rows]),
        Column("how\nmany", [f"{row.num_micro_batches:,}" for row in rows]),
    ]
    parts = [
        Column(heading, [_short(getattr(row.breakdown, kind)) for row in rows]) for kind, heading in _HEADINGS.items()
    ]
    sums = [
        Column("peak", [_short(row.peak_bytes) for row in rows]),
        Column("with\nmargin", [_short(row.needed_bytes) for row in rows]),
        Column("fits", ["yes" if row.fits else "no" for row in rows]),
    ]
    if rows[0].saving:
        sums.append(Column("changed", [row.saving for row in rows], "left"))
    styles = ["bold" if row == choice else "" if row.fits else "dim" for row in rows]
    print_wide(console, title, sizes, [parts, sums], styles)


_HEADINGS = {
    "parameters": "para-\nmeters",
    "gradients": "gradi-\nents",
    "optimizer_state": "optim.\nstate",
    "saved_activations": "saved\nact.",
    "temporaries": "tempo-\nraries",
    "inputs": "inputs",
}


def _short(num_bytes: int) -> str:
    """Bytes in as few letters as a table has room for: 1.5M, 12K."""
    number, unit = written(num_bytes).split()
    return f"{number}{unit[0]}"
