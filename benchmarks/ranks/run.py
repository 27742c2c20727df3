"""What does one reduction per window save against one per micro-batch, and what does it cost to be able to recover?

python -m benchmarks.ranks.run
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gradfold
from benchmarks.paired import ratio, write

QUESTION = "What does one reduction per window save, and what does recovery cost on several ranks?"
NUM_RANKS, NUM_MICRO_BATCHES, ROWS, NUM_ROUNDS, NUM_WARMUP = 2, 8, 8, 40, 5
WIDTHS = (128, 1024)
RESULT = Path(__file__).parent / "results" / "cpu.json"


def main() -> None:
    """Measure in two processes; rank 0 prints and writes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(folder,), nprocs=NUM_RANKS)  # type: ignore[attr-defined, no-untyped-call]


def work(rank: int, folder: str) -> None:
    """One process."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    results = {f"width {width}": measure(width) for width in WIDTHS}
    if rank == 0:
        for name, value in results.items():
            print(name)
            for what, figures in value.items():
                print(f"    {what:55s} {figures}")
        settings = {
            "ranks": NUM_RANKS,
            "micro_batches": NUM_MICRO_BATCHES,
            "rows_each": ROWS,
            "rounds": NUM_ROUNDS,
            "backend": "gloo",
        }
        write(RESULT, QUESTION, settings, results)
    dist.destroy_process_group()


def measure(width: int) -> dict[str, Any]:
    """Paired ratios of the arms, timed between barriers, in the same random order on both ranks."""
    ways = Arms(width)
    arms: dict[str, Callable[[], object]] = {
        "reduction per micro-batch": lambda: ways.loop(every=True),
        "reduction in the last backward": lambda: ways.loop(every=False),
        "gradfold": lambda: ways.gradfold(ways.accumulator),
        "gradfold, in the last backward": lambda: ways.gradfold(ways.overlapped),
    }
    order, shuffle = list(arms), random.Random(0).shuffle
    elapsed_s: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(NUM_WARMUP + NUM_ROUNDS):
        shuffle(order)
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            arms[name]()
            dist.barrier()
            if round_number >= NUM_WARMUP:
                elapsed_s[name].append(time.perf_counter() - start)
    median_ms = {name: round(sorted(values)[NUM_ROUNDS // 2] * 1e3, 2) for name, values in elapsed_s.items()}
    return {
        "milliseconds per window": median_ms,
        "per micro-batch / in the last backward": ratio(
            elapsed_s, "reduction per micro-batch", "reduction in the last backward"
        ),
        "gradfold / in the last backward": ratio(elapsed_s, "gradfold", "reduction in the last backward"),
        "gradfold / per micro-batch": ratio(elapsed_s, "gradfold", "reduction per micro-batch"),
        "gradfold, in the last backward / gradfold": ratio(elapsed_s, "gradfold, in the last backward", "gradfold"),
        "gradfold, in the last backward / in the last backward": ratio(
            elapsed_s, "gradfold, in the last backward", "reduction in the last backward"
        ),
    }


class Arms:
    """One gradient, three ways."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
        self.model = DistributedDataParallel(nn.Sequential(*layers))
        self.batch = torch.randn(NUM_MICRO_BATCHES * ROWS, width), torch.randint(0, 10, (NUM_MICRO_BATCHES * ROWS,))
        self.accumulator = gradfold.Accumulator(self.model, loss_fn, micro_batch_size=ROWS)
        other = DistributedDataParallel(copy.deepcopy(self.model.module))  # its hooks would be called in all arms
        self.overlapped = gradfold.Accumulator(other, loss_fn, micro_batch_size=ROWS, ddp_reduce="in_last_backward")

    def loop(self, every: bool) -> None:
        """The loop written by hand, with `no_sync` on all but the last micro-batch, or on none."""
        self.model.zero_grad()
        for index, part in enumerate(zip(*[tensor.split(ROWS) for tensor in self.batch], strict=True)):
            is_last = index == NUM_MICRO_BATCHES - 1
            with nullcontext() if every or is_last else self.model.no_sync():
                (loss_fn(self.model, part) / NUM_MICRO_BATCHES).backward()  # type: ignore[no-untyped-call]

    def gradfold(self, accumulator: gradfold.Accumulator) -> None:
        """All micro-batches under `no_sync`, and one reduction at the end; or the last one as in the loop."""
        accumulator.model.zero_grad()
        accumulator.backward(self.batch)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean loss of a micro-batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


if __name__ == "__main__":
    main()
