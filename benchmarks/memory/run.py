"""Is memory what was predicted, and is the micro-batch that sets itself the fastest?

python -m benchmarks.memory.run [predicted] [process] [flat] [chosen] [--data DIR]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gradfold
from benchmarks.memory.models import CASES, OPTIMIZERS
from benchmarks.paired import write
from gradfold.compare.data import take
from gradfold.memory.budget import margin_for
from gradfold.memory.dry_run import DryRun, ProbeBatch
from gradfold.memory.estimate import PeakEstimate
from gradfold.memory.system import high_water_mark_bytes
from gradfold.precision import Precision
from gradfold.workloads import registry
from gradfold.workloads.workload import Workload

FOLDER = Path(__file__).parent / "results"
CPU = torch.device("cpu")
SIZES, GLOBAL_BATCH = (12, 48, 96), 96
LARGE = {"perceptron": 32768, "LeNet": 8192, "ResNet": 1024, "decoder LM": 256, "U-Net shape": 768, "LSTM": 256}
NUM_SEARCHES = 5
SEARCHED = {"mnist": 128, "cifar10": 256, "digits": 512, "encoder": 64}  # global batches


def make(name: str, optimizer: str, rows: int) -> tuple[Any, Any, torch.optim.Optimizer, PeakEstimate]:
    """Model, batch, optimizer and prediction of a case."""
    torch.manual_seed(0)
    case = CASES[name]
    model, batch = case.make_model(), case.make_batch(rows)
    own = OPTIMIZERS[optimizer]([one for one in model.parameters() if one.requires_grad])
    program = DryRun(model, case.loss_fn, ProbeBatch(batch, None), own, Precision())
    return model, batch, own, PeakEstimate(program, CPU)


def step_of(name: str, model: Any, optimizer: torch.optim.Optimizer, size: int) -> gradfold.TrainStep:
    """An update of a case by the library."""
    accumulator = gradfold.Accumulator(
        model, CASES[name].loss_fn, micro_batch_size=size, batch_norm="per_micro_batch", self_check=False
    )
    return gradfold.TrainStep(accumulator, optimizer)


def predicted() -> dict[str, Any]:
    """Predicted against tracked peaks, at sizes that are not those of the runs behind the prediction."""
    found: dict[str, Any] = {}
    for name in CASES:
        for optimizer in OPTIMIZERS:
            model, batch, own, prediction = make(name, optimizer, GLOBAL_BATCH)
            errors = {}
            for size in SIZES:
                step = step_of(name, model, own, size)
                step(batch)
                peak = gradfold.measure_peak(partial(step, batch), model=model, optimizer=own)
                errors[size] = round(prediction.peak(size).total / peak.peak_bytes - 1, 6)
            found[f"{name}, {optimizer}"] = {
                "source": prediction.source,
                "tracked MiB": round(peak.peak_bytes / 2**20, 2),
                "error": errors,
            }
            show(f"{name}, {optimizer}: {errors}")
    return found


def process() -> dict[str, Any]:
    """The high-water mark of fresh processes at peaks of 500 MiB and more, against the prediction."""
    found = {}
    for name, rows in LARGE.items():
        code = f"from benchmarks.memory.run import one_process; one_process({name!r}, {rows})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        found[name] = one = json.loads(done.stdout)
        show(f"{name}: {one}")
    return found


def one_process(name: str, rows: int) -> None:
    """Two updates of the whole batch at once, then the mark and the prediction."""
    torch.set_num_threads(1)
    baseline = high_water_mark_bytes()
    torch.manual_seed(0)
    case = CASES[name]
    model, batch = case.make_model(), case.make_batch(rows)
    optimizer = OPTIMIZERS["Adam"]([one for one in model.parameters() if one.requires_grad])
    step = step_of(name, model, optimizer, rows)
    step(batch), step(batch)
    mark = high_water_mark_bytes()
    prediction = PeakEstimate(DryRun(model, case.loss_fn, ProbeBatch(batch, None), optimizer, Precision()), CPU)
    peak = prediction.peak(rows).total
    margin = margin_for(CPU, None, is_process_there=False)
    result = {
        "predicted MiB": round(peak / 2**20),
        "mark MiB": round(mark / 2**20),
        "mark before MiB": round(baseline / 2**20),
        "mark over prediction with margin": round(mark / margin.with_margin(peak), 3),
    }
    print(json.dumps(result))


def flat() -> dict[str, Any]:
    """Peaks of 2 and of 64 micro-batches to an update, without their inputs."""
    found = {}
    for name in ("perceptron", "LeNet", "decoder LM"):
        peaks = []
        for how_many in (2, 64):
            model, batch, own, _ = make(name, "Adam", 8 * how_many)
            step = step_of(name, model, own, 8)
            step(batch)
            peak = gradfold.measure_peak(partial(step, batch), model=model, optimizer=own)
            peaks.append(peak.peak_bytes - peak.breakdown.inputs)
        found[name] = {
            "2, KiB": peaks[0] // 2**10,
            "64, KiB": peaks[1] // 2**10,
            "ratio": round(peaks[1] / peaks[0], 5),
        }
        show(f"{name}: {found[name]}")
    return found


def chosen(data: Path | None) -> dict[str, Any]:
    """Five searches against windows of every size, timed in turn."""
    found = {}
    for name, rows in SEARCHED.items():
        folder = None if data is None or not (data / name).is_dir() else data / name
        workload = registry.load(name, folder)
        batch = take(workload, torch.arange(rows))
        choices = []
        for _ in range(NUM_SEARCHES):
            auto = gradfold.Auto(cache=False)
            choices.append(accumulator_of(workload, auto).tune(batch))
        paces = exhaustive(workload, batch, rows)
        best = max(paces.values())
        shares = [round(paces[choice.micro_batch_size] / best, 3) for choice in choices]
        found[name] = {
            "global batch": rows,
            "chosen": [choice.micro_batch_size for choice in choices],
            "seconds": [round(choice.elapsed_s, 1) for choice in choices],
            "share of the best pace": shares,
            "median share": statistics.median(shares),
            "paces, samples/s": {size: round(pace) for size, pace in paces.items()},
        }
        show(f"{name}: {found[name]}")
    return found


def accumulator_of(workload: Workload, size: Any) -> gradfold.Accumulator:
    """The library on a workload."""
    torch.manual_seed(0)
    return gradfold.Accumulator(
        workload.make_model(),
        workload.loss_fn,
        micro_batch_size=size,
        weight=workload.weight,
        collate=workload.collate,
        batch_norm=workload.batch_norm,
        self_check=False,
    )


def exhaustive(workload: Workload, batch: Any, rows: int, seconds: float = 20.0) -> dict[int, float]:
    """Samples per second of whole windows by micro-batch size: medians of ratios within rounds, times the best's."""
    powers = {2**power for power in range(rows.bit_length())} | {3 * 2**power for power in range(rows.bit_length())}
    sizes = sorted(size for size in powers if size <= rows)
    windows: dict[int, Callable[[], Any]] = {}
    for size in sizes:
        windows[size] = partial(accumulator_of(workload, size).backward, batch)
        windows[size]()
    rounds: list[dict[int, float]] = []
    end, order = time.perf_counter() + seconds, random.Random(0)
    while time.perf_counter() < end or len(rounds) < 3:
        order.shuffle(sizes)
        elapsed_s = {}
        for size in sizes:
            start = time.thread_time()  # one thread does all the work, and other programs have no part in it
            windows[size]()
            elapsed_s[size] = time.thread_time() - start
        rounds.append(elapsed_s)
    reference = rows
    pace = statistics.median(rows / one[reference] for one in rounds)
    return {size: pace * statistics.median(one[reference] / one[size] for one in rounds) for size in sorted(sizes)}


def show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["predicted", "process", "flat", "chosen"])
    parser.add_argument("--data", type=Path, help="folder with mnist/ and cifar10/; else they are downloaded")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "predicted": predicted,
        "process": process,
        "flat": flat,
        "chosen": partial(chosen, arguments.data),
    }
    for part in arguments.parts:
        settings = {"global batch": GLOBAL_BATCH, "sizes": SIZES} if part == "predicted" else {}
        write(FOLDER / f"{part}.json", str(globals()[part].__doc__), settings, parts[part]())


if __name__ == "__main__":
    main()
