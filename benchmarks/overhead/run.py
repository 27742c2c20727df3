"""What does a window cost beyond its micro-steps?

python -m benchmarks.overhead.run
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradfold
from benchmarks.paired import ratio, time_rounds, write

QUESTION = "What does a window cost beyond its micro-steps?"
NUM_MICRO_BATCHES, ROWS, NUM_REPEATS = 8, 8, 9
NUM_ROUNDS = {1: 600, 10: 100}  # windows in a row -> rounds
RESULT = Path(__file__).parent / "results" / "cpu.json"


def main() -> None:
    """Measure in several repeats, print the median one and write all."""
    results = {}
    for label, in_a_row in (("single windows in turn", 1), ("ten windows in a row", 10)):
        # Where a process lays out its memory is worth a percent or two: each repeat has a process of its own.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as fresh:
            repeats = list(fresh.map(measure, range(NUM_REPEATS), [in_a_row] * NUM_REPEATS))
        repeats.sort(key=lambda repeat: repeat["gradfold / plain loop"]["median"])
        results[label] = {"median_repeat": repeats[NUM_REPEATS // 2], "repeats": repeats}
        print(label)
        for name, value in repeats[NUM_REPEATS // 2].items():
            print(f"    {name:42s} {value}")
        medians = [repeat["gradfold / plain loop"]["median"] for repeat in repeats]
        print(f"    gradfold / plain loop, {NUM_REPEATS} repeats          {medians}")
    settings = {
        "micro_batches": NUM_MICRO_BATCHES,
        "rows_each": ROWS,
        "rounds": NUM_ROUNDS,
        "repeats": NUM_REPEATS,
        "model": "perceptron 64-128-128-10",
    }
    write(RESULT, QUESTION, settings, results)


def measure(seed: int, in_a_row: int) -> dict[str, Any]:
    """Paired ratios of one repeat, each round timing some windows in a row of every arm."""
    torch.set_num_threads(1)
    ways = Arms(seed)
    arms = {
        "plain loop": ways.plain_loop,
        "best loop": ways.best_loop,
        "gradfold": ways.gradfold,
        "window.backward(loss)": ways.window,
    }
    num_rounds = NUM_ROUNDS[in_a_row]
    elapsed_s = time_rounds({name: partial(repeat, arm, in_a_row) for name, arm in arms.items()}, num_rounds, 10)
    plain = sorted(elapsed_s["plain loop"])[num_rounds // 2]
    return {
        "plain loop, microseconds per micro-step": round(plain / in_a_row / NUM_MICRO_BATCHES * 1e6, 1),
        "gradfold / plain loop": ratio(elapsed_s, "gradfold", "plain loop"),
        "gradfold / best loop": ratio(elapsed_s, "gradfold", "best loop"),
        "window.backward(loss) / plain loop": ratio(elapsed_s, "window.backward(loss)", "plain loop"),
        "best loop / plain loop": ratio(elapsed_s, "best loop", "plain loop"),
    }


def repeat(arm: Callable[[], object], times: int) -> None:
    """Some windows in a row."""
    for _ in range(times):
        arm()


class Arms:
    """The same gradient, four ways, on one model."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        self.parameters = list(self.model.parameters())
        num_rows = NUM_MICRO_BATCHES * ROWS
        self.inputs, self.targets = torch.randn(num_rows, 64), torch.randint(0, 10, (num_rows,))
        self.loader = list(zip(self.inputs.split(ROWS), self.targets.split(ROWS), strict=True))
        # One call for all windows, as a loop makes it: the first windows are looked at more closely.
        self.windows = gradfold.windows(itertools.cycle(self.loader), NUM_MICRO_BATCHES, model=self.model)
        self.criterion = nn.CrossEntropyLoss()
        self.accumulator = gradfold.Accumulator(self.model, self.loss_fn, micro_batch_size=ROWS)

    def loss_fn(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean loss of a micro-batch."""
        loss: Tensor = self.criterion(model(batch[0]), batch[1])
        return loss

    def zero(self) -> None:
        """Empty the gradients; every arm begins with it."""
        for parameter in self.parameters:
            parameter.grad = None

    def plain_loop(self) -> Tensor:
        """As articles print it: slices of the batch, loss / n, a running loss."""
        self.zero()
        total = torch.zeros(())
        for start in range(0, len(self.inputs), ROWS):
            rows = slice(start, start + ROWS)
            loss = self.criterion(self.model(self.inputs[rows]), self.targets[rows]) / NUM_MICRO_BATCHES
            loss.backward()
            total = total + loss.detach()
        return total

    def best_loop(self) -> Tensor:
        """The fastest that can be written by hand: one split, the weight as the seed, losses averaged at the end."""
        self.zero()
        seed = torch.tensor(1 / NUM_MICRO_BATCHES)
        losses = []
        for rows, labels in zip(self.inputs.split(ROWS), self.targets.split(ROWS), strict=True):
            loss = self.criterion(self.model(rows), labels)
            loss.backward(gradient=seed)
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def gradfold(self) -> Tensor:
        """The whole batch to an accumulator."""
        self.zero()
        return self.accumulator.backward((self.inputs, self.targets)).loss

    def window(self) -> Tensor:
        """The loop body as it was, over a loader of micro-batches."""
        self.zero()
        window = next(self.windows)
        for rows, labels in window:
            window.backward(self.criterion(self.model(rows), labels))
        return window.loss


if __name__ == "__main__":
    main()
