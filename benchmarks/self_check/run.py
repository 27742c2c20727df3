"""What does the self-check of the first window cost, in micro-steps?

python -m benchmarks.self_check.run
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradfold
from benchmarks.paired import time_rounds, write

QUESTION = "What does the self-check of the first window cost, in micro-steps?"
NUM_MICRO_BATCHES, NUM_ROUNDS = 4, 31
RESULT = Path(__file__).parent / "results" / "cpu.json"


def perceptron() -> nn.Module:
    """Micro-steps of a fraction of a millisecond."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def convolutions() -> nn.Module:
    """Nothing random."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 32 * 32, 10))


def transformer() -> nn.Module:
    """Dropout everywhere, so that draws must be handed to rows."""
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(64 * 128, 10))


MODELS = {
    "perceptron": (perceptron, (64,)),
    "two convolutions": (convolutions, (3, 32, 32)),
    "transformer with dropout": (transformer, (64, 128)),
}


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean loss of a micro-batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def window(model: nn.Module, batch: tuple[Tensor, Tensor], rows: int, self_check: bool) -> None:
    """The first window of an accumulator."""
    model.zero_grad()
    gradfold.Accumulator(model, loss_fn, micro_batch_size=rows, self_check=self_check).backward(batch)


def measure(name: str, rows: int) -> dict[str, Any]:
    """Extra time of a first window with the self-check, paired round by round, in micro-steps."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, num_rows = make(), rows * NUM_MICRO_BATCHES
    batch = (torch.randn(num_rows, *shape), torch.randint(0, 10, (num_rows,)))
    arms = {which: partial(window, model, batch, rows, which == "with") for which in ("with", "without")}
    elapsed_s = time_rounds(arms, NUM_ROUNDS, 5)
    step_s = statistics.median(elapsed_s["without"]) / NUM_MICRO_BATCHES
    extra = [(a - b) / step_s for a, b in zip(elapsed_s["with"], elapsed_s["without"], strict=True)]
    lower, median, upper = statistics.quantiles(extra, n=4)
    return {
        "micro-step, milliseconds": round(step_s * 1e3, 2),
        "self-check, micro-steps": {
            "median": round(median, 2),
            "lower_quartile": round(lower, 2),
            "upper_quartile": round(upper, 2),
        },
        "self-check, milliseconds": round(median * step_s * 1e3, 1),
    }


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    results = {}
    for name in MODELS:
        for rows in (4, 8, 32):
            results[f"{name}, {rows} rows"] = value = measure(name, rows)
            print(f"{name + ',':26s} {rows:2d} rows", value)
    write(RESULT, QUESTION, {"micro_batches": NUM_MICRO_BATCHES, "rounds": NUM_ROUNDS}, results)


if __name__ == "__main__":
    main()
