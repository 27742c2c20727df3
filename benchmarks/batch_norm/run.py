"""What does exact BatchNorm cost in time and in device memory, and what does BatchNorm by micro-batch get wrong?

PYTHONPATH=tests python -m benchmarks.batch_norm.run [--threads 1] [--device cpu|cuda]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from live_bytes import LiveBytes
from reference import gradients, relative_error
from resnet18 import classify, resnet18
from torch import Tensor

import gradfold
from benchmarks.paired import ratio, time_rounds, write
from gradfold.batchnorm import exact as exact_batch_norm
from gradfold.batchnorm.offload import Offload

QUESTION = "What does exact BatchNorm cost in time and in device memory?"
NUM_ROWS, NUM_MICRO_BATCHES, SIDE, WIDTH, NUM_ROUNDS, NUM_WARMUP = 64, 16, 32, 16, 30, 4
MIB = 2**20


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    ways = Ways(torch.device(given.device))
    results = {"gradient": errors(ways), "memory": memory(ways), "time": times(ways, given.rounds)}
    for what, figures in results.items():
        print(what)
        for name, value in figures.items():
            print(f"    {name:45s} {value}")
    settings = {
        "model": f"20 BatchNorm layers in the shape of ResNet-18, {WIDTH} channels, {SIDE} x {SIDE} pixels, float32",
        "rows": NUM_ROWS,
        "micro_batches": NUM_MICRO_BATCHES,
        "rounds": given.rounds,
        "threads": given.threads,
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
    }
    name = f"{given.device}.json" if given.threads == 1 else f"{given.device}-{given.threads}-threads.json"
    write(Path(__file__).parent / "results" / name, QUESTION, settings, results)


class Ways:
    """One window, four ways."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = resnet18(WIDTH).to(device)
        self.batch = torch.randn(NUM_ROWS, 3, SIDE, SIDE).to(device), torch.randint(0, 10, (NUM_ROWS,)).to(device)
        size = NUM_ROWS // NUM_MICRO_BATCHES
        self.parts = list(zip(*[one.split(size) for one in self.batch], strict=True))
        self.accumulators = {
            name: gradfold.Accumulator(self.model, classify, micro_batch_size=size, batch_norm=name, self_check=False)
            for name in ("exact", "per_micro_batch")
        }
        self.runs: dict[str, Callable[[], object]] = {
            "plain micro-batches": self.plain,
            "exact": lambda: self.accumulators["exact"].backward(self.batch),
            "per_micro_batch": lambda: self.accumulators["per_micro_batch"].backward(self.batch),
            "full batch": lambda: classify(self.model, self.batch).backward(),
        }

    def plain(self) -> None:
        """The loop as it is written by hand."""
        for part in self.parts:
            (classify(self.model, part) / NUM_MICRO_BATCHES).backward()

    def run(self, name: str) -> None:
        """One window, from empty gradients to its end."""
        self.model.zero_grad()
        self.runs[name]()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def errors(ways: Ways) -> dict[str, float]:
    """How far gradients are from the full batch's in float64."""
    twin = Ways(torch.device("cpu"))
    twin.model.double()
    twin.batch = twin.batch[0].double(), twin.batch[1]
    twin.run("full batch")
    truth = gradients(twin.model)
    found = {}
    for name in ways.runs:
        ways.run(name)
        found[name] = float(
            f"{relative_error({key: one.cpu() for key, one in gradients(ways.model).items()}, truth):.2g}"
        )
    return found


def memory(ways: Ways) -> dict[str, Any]:
    """The peak of each way: CUDA's own count; on a CPU a count of live tensors, but for what waits on the host."""
    peaks = {name: _peak_bytes(ways, name) for name in ways.runs}
    mib = {f"{name}, MiB": round(peak / MIB, 2) for name, (peak, _) in peaks.items()}
    to_plain = round(peaks["exact"][0] / peaks["plain micro-batches"][0], 3)
    on_host = {"exact, sent to the host, MiB": round(peaks["exact"][1] / MIB, 2)} if peaks["exact"][1] else {}
    return {**mib, **on_host, "exact / plain micro-batches": to_plain}


def _peak_bytes(ways: Ways, name: str) -> tuple[int, int]:
    ways.model.zero_grad()
    if ways.device.type == "cuda":
        ways.run(name)
        ways.model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ways.run(name)
        return torch.cuda.max_memory_allocated() - before, 0
    live, to_host = LiveBytes(), Offload.to_host

    def elsewhere(self: Offload, tensor: Tensor) -> Tensor:
        with live.not_counted():
            return to_host(self, tensor)

    # The host plays a device: what a device would send to the host is copied, and the copies are not counted.
    with (
        mock.patch.object(exact_batch_norm, "has_own_memory", lambda device: True),
        mock.patch.object(Offload, "to_host", elsewhere),
        live,
    ):
        ways.run(name)
    return live.peak, live.elsewhere


def times(ways: Ways, num_rounds: int) -> dict[str, Any]:
    """Paired ratios of times."""
    elapsed_s = time_rounds({name: _runner(ways, name) for name in ways.runs}, num_rounds, NUM_WARMUP)
    medians = {f"{name}, ms": round(statistics.median(values) * 1e3, 1) for name, values in elapsed_s.items()}
    ratios = {
        f"{name} / plain micro-batches": ratio(elapsed_s, name, "plain micro-batches")
        for name in ways.runs
        if name != "plain micro-batches"
    }
    return {**medians, **ratios, "exact / full batch": ratio(elapsed_s, "exact", "full batch")}


def _runner(ways: Ways, name: str) -> Callable[[], object]:
    return lambda: ways.run(name)


if __name__ == "__main__":
    main()
