"""What does dropout by hash cost beside torch's?

python -m benchmarks.dropout.run
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import gradfold
from benchmarks.paired import ratio, time_rounds, write

QUESTION = "What does dropout by hash cost beside torch's?"
ROWS, TOKENS, WIDTH, NUM_ROUNDS = 16, 64, 256, 40
RESULT = Path(__file__).parent / "results" / "cpu.json"


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    results = {}
    for label, model, shape in (
        ("the layer alone", nn.Sequential(nn.Dropout(0.1)), (ROWS, TOKENS, WIDTH)),
        ("a perceptron block of a Transformer", block(), (ROWS, TOKENS, WIDTH)),
    ):
        results[label] = measure(model, torch.randn(shape))
        print(label)
        for name, value in results[label].items():
            print(f"    {name:42s} {value}")
    settings = {"rows": ROWS, "tokens": TOKENS, "width": WIDTH, "rounds": NUM_ROUNDS}
    write(RESULT, QUESTION, settings, results)


def block() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)
    )


def measure(model: nn.Module, inputs: Tensor) -> dict[str, object]:
    """Paired ratios of forward and backward pass."""
    inputs = inputs.requires_grad_()
    converted = gradfold.convert_dropout(copy.deepcopy(model))
    without = copy.deepcopy(model)
    for layer in without.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0

    def step(call: Callable[[Tensor], Tensor], model: nn.Module) -> None:
        model.zero_grad()
        with gradfold.counter_based_dropout(model, update=0, num_rows=ROWS):
            call(inputs).sum().backward()

    arms = {
        "torch": partial(step, model, model),
        "counter-based": partial(step, converted, converted),
        "none": partial(step, without, without),
        "torch, compiled": partial(step, torch.compile(model, fullgraph=True), model),
        "counter-based, compiled": partial(step, torch.compile(converted, fullgraph=True), converted),
    }
    elapsed_s = time_rounds(arms, NUM_ROUNDS, 5)
    return {
        "torch, milliseconds": round(1000 * sorted(elapsed_s["torch"])[NUM_ROUNDS // 2], 2),
        "counter-based / torch": ratio(elapsed_s, "counter-based", "torch"),
        "none / torch": ratio(elapsed_s, "none", "torch"),
        "counter-based / torch, both compiled": ratio(elapsed_s, "counter-based, compiled", "torch, compiled"),
        "counter-based, compiled / torch": ratio(elapsed_s, "counter-based, compiled", "torch"),
    }


if __name__ == "__main__":
    main()
