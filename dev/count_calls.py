"""How many files and functions of gradfold does one `Accumulator.backward(batch)` enter in the steady state?

    python dev/count_calls.py            # the counts, and the files with the functions entered in each
    python dev/count_calls.py --model batch-norm

A plain window of four micro-batches, after a few windows in which everything has been seen before. Functions are code
objects, comprehensions and lambdas included. The user's own loss is not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import gradfold

SOURCE = Path(gradfold.__file__).parent
MODELS = {
    "plain": lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
    "batch-norm": lambda: nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)),
}


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="plain")
    name = parser.parse_args().model
    options: dict[str, Any] = {"batch_norm": "per_micro_batch"} if name == "batch-norm" else {}
    found = functions_entered(MODELS[name](), **options)
    files = defaultdict(list)
    for code in found:
        files[str(Path(code.co_filename).relative_to(SOURCE))].append(code.co_qualname)
    for file, names in sorted(files.items()):
        print(f"{file}\n    {', '.join(sorted(names))}")
    print(f"{len(files)} files, {len(found)} functions")


def functions_entered(model: nn.Module, **options: Any) -> set[CodeType]:
    """The functions of gradfold that a window enters when nothing about it is new."""
    criterion = nn.CrossEntropyLoss()
    batch = torch.randn(32, 64), torch.randint(0, 10, (32,))

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = criterion(model(batch[0]), batch[1])
        return loss

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, **options)
    for _ in range(3):
        model.zero_grad()
        accumulator.backward(batch)
    model.zero_grad()
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(SOURCE)):
            found.add(frame.f_code)

    sys.setprofile(note)
    try:
        accumulator.backward(batch)
    finally:
        sys.setprofile(None)
    return found


if __name__ == "__main__":
    main()
