"""The command `gradfold plan`."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from gradfold.accumulator import Accumulator
from gradfold.cli.tables import Column, print_wide, wide_enough
from gradfold.compare.data import epoch_order, num_samples, take
from gradfold.distributed.fsdp import shard
from gradfold.distributed.launch import fake_process_group
from gradfold.errors import OptionError
from gradfold.memory.amount import read_bytes, written
from gradfold.memory.plan import Plan, PlanRow
from gradfold.memory.plan import plan as make_plan
from gradfold.memory.savings import longest_list
from gradfold.workloads import registry
from gradfold.workloads.workload import Workload

__all__: list[str] = []

EPILOG = """
**Examples**

`gradfold plan mnist --memory 1GiB` — all of the workload's global batch fits at once

`gradfold plan cifar10 --memory 4GiB --global-batch 50000` — a batch of the whole data set: which micro-batch?

`gradfold plan resnet --memory 16GiB --global-batch 1433 --device cuda` — for a GPU that is not here

`gradfold plan encoder --memory 700MiB --global-batch 1024 --fully-shard 8` — for one of eight processes

`gradfold plan encoder --memory 850MiB --global-batch 1024 --json` — for a program to read

`gradfold plan train.py:workload --memory 16GiB` — your own model: a function that returns a gradfold.Workload

In Python: `print(gradfold.plan(accumulator, batch, optimizer, memory="16GiB"))`

Exit codes: 0 something fits, 1 not even one row does, 2 wrong usage.
"""


def plan(
    workload: Annotated[
        str, typer.Argument(help="A built-in name (see gradfold workloads), module:callable or path.py:callable.")
    ],
    memory: Annotated[
        str, typer.Option(help="The budget of the process or device: 16GiB, 512MiB, ...", metavar="SIZE")
    ],
    global_batch: Annotated[int | None, typer.Option(help="Samples of one update. [default: the workload's]")] = None,
    device: Annotated[
        str | None, typer.Option(help="Plan for cpu or cuda, there or not. [default: the model's]", metavar="DEVICE")
    ] = None,
    fully_shard: Annotated[
        int, typer.Option(min=1, help="Processes that share parameters and batch; one is planned.", metavar="N")
    ] = 1,
    margin: Annotated[float, typer.Option(help="Share to add to predictions.")] = 0.1,
    data: Annotated[Path | None, typer.Option(help="Folder with the workload's data files.", metavar="DIR")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, and nothing else.")] = False,
) -> None:
    """Say which micro-batch of a workload fits into memory, before it is run.

    A window and an update run on **fake tensors**, which take no memory and about a second, at two small sizes: from
    these the peak of every size follows. The table has it by size, with what it is made of:

    - **parameters**, **gradients**, **optimizer state**, **inputs**: there all the time, more or less

    - **saved activations**: what the forward pass keeps for the backward pass

    - **temporaries**: everything else at that moment

    - **needed**: the peak with a margin for what cannot be known, which is named below the table

    Where the budget is short, rows below the line show what checkpointing, a lower precision and other levers would
    allow. Recurrent models, and those that do not run on fake tensors, are run on a few real rows instead.

    With `--fully-shard N` one of N processes is planned, which share parameters, gradients and optimizer state (FSDP2;
    each layer of the longest list is sharded, then the model) and have an N-th of the batch each.
    """
    read_bytes(memory)  # before anything is loaded
    chosen = registry.load(workload, data)
    total = num_samples(chosen)
    size = chosen.global_batch_size if global_batch is None else global_batch
    if not fully_shard <= size <= total:
        raise OptionError(
            f"--global-batch {size}: expected {fully_shard} to {total} samples, which is what workload "
            f"{chosen.name!r} has."
        )
    with nullcontext() if fully_shard == 1 else fake_process_group(fully_shard), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody writes to here
        found = _plan(chosen, memory, -(-size // fully_shard), fully_shard > 1, device, margin)
    if as_json:
        print(
            json.dumps(
                {"workload": chosen.name, "num_processes": fully_shard, **found.to_json()}, indent=1, allow_nan=False
            )
        )
    else:
        _print(chosen, found, fully_shard)


def _plan(workload: Workload, memory: str, num_rows: int, is_sharded: bool, device: str | None, margin: float) -> Plan:
    torch.manual_seed(0)
    model = workload.make_model()
    if is_sharded:
        shard(model, longest_list(model))
    accumulator = Accumulator(
        model, workload.loss_fn, weight=workload.weight, collate=workload.collate, batch_norm=workload.batch_norm
    )
    optimizer = workload.make_optimizer(model.parameters())
    batch = take(workload, epoch_order(num_samples(workload), 0, 0, workload.shuffle)[:num_rows])
    return make_plan(accumulator, batch, optimizer, memory=memory, device=device, margin=margin)


def _print(workload: Workload, found: Plan, num_processes: int) -> None:
    console = wide_enough(Console(highlight=False))
    console.print(Text.assemble((workload.name, "bold"), f": {workload.description}"))
    budget = written(found.budget_bytes)
    of_one = "global batch" if num_processes == 1 else f"one of {num_processes} processes, its part of the global batch"
    console.print(Text(f"{of_one} {found.num_rows:,}, budget {budget}, on {found.device}", style="dim"))
    _print_table(console, "\nPredicted peak", [row for row in found.rows if not row.lever], found.choice)
    levers = [row for row in found.rows if row.lever]
    if levers:
        _print_table(console, "\nWhat would change it", levers, found.choice)
        console.print()
        for row in levers:
            console.print(Padding(Text(f"{row.lever}: {row.price}", style="dim"), (0, 0, 0, 2)))
    choice = found.choice
    updates = (
        "the whole batch at once" if choice.num_micro_batches == 1 else f"{choice.num_micro_batches:,} to an update"
    )
    console.print(Text(f"\nMicro-batch {choice.micro_batch_size:,}: {updates}.", style="bold green"))
    for note in found.notes:
        console.print(Text(note, style="dim"))


def _print_table(console: Console, title: str, rows: list[PlanRow], choice: PlanRow) -> None:
    sizes = [
        Column("micro-\nbatch", [f"{row.micro_batch_size:,}" for row in rows]),
        Column("how\nmany", [f"{row.num_micro_batches:,}" for row in rows]),
    ]
    parts = [
        Column(heading, [_short(row.make_up.to_json()[kind]) for row in rows]) for kind, heading in _HEADINGS.items()
    ]
    sums = [
        Column("peak", [_short(row.peak_bytes) for row in rows]),
        Column("with\nmargin", [_short(row.needed_bytes) for row in rows]),
        Column("fits", ["yes" if row.fits else "no" for row in rows]),
    ]
    if rows[0].lever:
        sums.append(Column("changed", [row.lever for row in rows], "left"))
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
