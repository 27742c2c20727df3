"""Is accumulation slower than the full batch, on a CPU?

python -m benchmarks.full_batch.run
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import gradfold
from benchmarks.paired import ratio, time_rounds, write

QUESTION = "Is accumulation slower than the full batch, on a CPU?"
GLOBAL_BATCH, SIZES, NUM_ROUNDS, NUM_WARMUP = 512, (8, 16, 32, 64, 128, 256), 15, 2
RESULT = Path(__file__).parent / "results" / "cpu.json"


def lenet() -> nn.Module:
    """The network of the cifar10 workload."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def wide_cnn() -> nn.Module:
    """Three 3x3 convolutions of 32, 64 and 64 channels."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Linear(1024, 10),
    )


def main() -> None:
    """Measure both networks with one and with all threads, print a table and write the result."""
    all_threads = torch.get_num_threads()
    results = {}
    for threads in sorted({1, all_threads}):
        torch.set_num_threads(threads)
        for name, make_model in (("cifar10 LeNet", lenet), ("wider CNN", wide_cnn)):
            label = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
            results[label] = measure(make_model)
            print(label)
            for row, value in results[label].items():
                print(f"    {row:24s} {value}")
    settings = {"global_batch": GLOBAL_BATCH, "rounds": NUM_ROUNDS, "shape": [3, 32, 32]}
    write(RESULT, QUESTION, settings, results)


def measure(make_model: Callable[[], nn.Module]) -> dict[str, object]:
    """The time of a window relative to the full batch's, per micro-batch size."""
    torch.manual_seed(0)
    model = make_model()
    batch = torch.randn(GLOBAL_BATCH, 3, 32, 32), torch.randint(0, 10, (GLOBAL_BATCH,))

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def full_batch() -> None:
        model.zero_grad()
        loss_fn(model, batch).backward()

    def accumulated(size: int) -> Callable[[], None]:
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=size)

        def run() -> None:
            model.zero_grad()
            accumulator.backward(batch)

        return run

    arms = {"full batch": full_batch} | {f"micro-batches of {size}": accumulated(size) for size in SIZES}
    elapsed_s = time_rounds(arms, NUM_ROUNDS, NUM_WARMUP)
    full_s = sorted(elapsed_s["full batch"])[NUM_ROUNDS // 2]
    rows: dict[str, object] = {"full batch, samples/s": round(GLOBAL_BATCH / full_s)}
    for name in arms:
        if name != "full batch":
            rows[name] = ratio(elapsed_s, name, "full batch")
    return rows


if __name__ == "__main__":
    main()
