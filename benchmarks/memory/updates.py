"""Is an update whose micro-batch has set itself faster than the full batch and the plain loop?

python -m benchmarks.memory.updates [--data DIR]
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gradfold
from benchmarks.paired import ratio, time_rounds, write
from gradfold.batch.split import split_rows
from gradfold.compare.data import take
from gradfold.workloads import registry
from gradfold.workloads.workload import Workload

QUESTION = "Is an update whose micro-batch has set itself faster than the full batch and the plain loop?"
RESULT = Path(__file__).parent / "results" / "updates.json"
WORKLOADS = ("mnist", "cifar10", "digits")
THREADS = (1, 2)
NUM_ROUNDS, NUM_REPEATS = {"mnist": 100, "cifar10": 30, "digits": 100}, 5
PAIRS = ("sets itself / full batch", "sets itself / plain loop", "plain loop / full batch")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with mnist/ and cifar10/; else they are downloaded")
    data = parser.parse_args().data
    results = {}
    # Where a process lays out its memory is worth some percent: each repeat has a process of its own.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh:
        for name in WORKLOADS:
            folder = data / name if data is not None and (data / name).is_dir() else None
            for threads in THREADS:
                repeats = list(fresh.map(partial(compare, name, folder), [threads] * NUM_REPEATS))
                label = f"{name}, {threads} thread{'s' * (threads > 1)}"
                results[label] = {"chosen": [repeat["chosen"] for repeat in repeats]} | {
                    pair: sorted(repeat[pair]["median"] for repeat in repeats) for pair in PAIRS
                }
                medians = {pair: statistics.median(results[label][pair]) for pair in PAIRS}
                print(label, results[label]["chosen"], medians, flush=True)
    settings = {"rounds": NUM_ROUNDS, "repeats": NUM_REPEATS, "sizes": "those of the workloads"}
    write(RESULT, QUESTION, settings, results)


def compare(name: str, folder: Path | None, threads: int) -> dict[str, Any]:
    """Paired ratios of the times of whole updates on one batch, and the size that was chosen."""
    torch.set_num_threads(threads)
    workload = registry.load(name, folder)
    batch = take(workload, torch.arange(workload.global_batch_size))
    torch.manual_seed(0)
    model = workload.make_model()
    step = itself(workload, copy.deepcopy(model))
    step(batch)
    choice = step.accumulator.micro_batch_choice
    assert choice is not None
    arms: dict[str, Callable[[], object]] = {
        "sets itself": partial(step, batch),
        "full batch": full_batch(workload, copy.deepcopy(model), batch),
        "plain loop": plain_loop(workload, copy.deepcopy(model), batch),
    }
    elapsed_s = time_rounds(arms, NUM_ROUNDS[name], num_warmup=5)
    found: dict[str, Any] = {pair: ratio(elapsed_s, *pair.split(" / ")) for pair in PAIRS}
    return found | {"chosen": choice.micro_batch_size}


def itself(workload: Workload, model: torch.nn.Module) -> gradfold.TrainStep:
    """The library."""
    accumulator = gradfold.Accumulator(
        model, workload.loss_fn, micro_batch_size=gradfold.Auto(cache=False), weight=workload.weight, self_check=False
    )
    return gradfold.TrainStep(accumulator, workload.make_optimizer(model.parameters()))


def full_batch(workload: Workload, model: torch.nn.Module, batch: Any) -> Callable[[], object]:
    """Plain torch, the whole batch at once."""
    optimizer = workload.make_optimizer(model.parameters())

    def update() -> float:
        optimizer.zero_grad()
        loss = loss_of(workload, model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return update


def plain_loop(workload: Workload, model: torch.nn.Module, batch: Any) -> Callable[[], object]:
    """Accumulation as it is written by hand, over micro-batches that a loader has cut already."""
    optimizer = workload.make_optimizer(model.parameters())
    parts = [part.data for part in split_rows(batch, workload.micro_batch_size)]

    def update() -> float:
        optimizer.zero_grad()
        total = 0.0
        for part in parts:
            loss = loss_of(workload, model, part) / len(parts)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        optimizer.step()
        return total

    return update


def loss_of(workload: Workload, model: torch.nn.Module, batch: Any) -> torch.Tensor:
    """The loss alone, of what a workload's function gives."""
    output = workload.loss_fn(model, batch)
    loss = output[0] if isinstance(output, tuple) else output
    assert isinstance(loss, torch.Tensor)
    return loss


if __name__ == "__main__":
    main()
