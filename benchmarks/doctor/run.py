"""How much slower is a script while the doctor watches it?

python -m benchmarks.doctor.run
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paired import ratio, time_rounds, write
from gradfold.doctor.instrumentation import Guard, Patches
from gradfold.doctor.run import record
from gradfold.doctor.stop import Stop

QUESTION = "How much slower is a script while the doctor watches it?"
NUM_UPDATES, NUM_MICRO_BATCHES, NUM_ROUNDS = 8, 4, 12
RESULT = Path(__file__).parent / "results" / "cpu.json"


def main() -> None:
    """Time eight updates, the doctor's default, of three models with and without the doctor; print and write ratios."""
    torch.set_num_threads(1)
    results = {}
    for name, (model, make_batch) in models().items():
        train = training(model, make_batch)
        elapsed_s = time_rounds({"plain": train, "recorded": lambda train=train: recorded(train)}, NUM_ROUNDS, 3)
        micro_steps = NUM_UPDATES * NUM_MICRO_BATCHES
        plain_ms = sorted(elapsed_s["plain"])[NUM_ROUNDS // 2] / micro_steps * 1e3
        results[name] = {"plain ms per micro-step": round(plain_ms, 3), **ratio(elapsed_s, "recorded", "plain")}
        print(f"{name:28s} {results[name]}")
    settings = {"updates": NUM_UPDATES, "micro_batches": NUM_MICRO_BATCHES, "rounds": NUM_ROUNDS}
    write(RESULT, QUESTION, settings, results)


def models() -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """Networks with micro-steps of three lengths, and what makes them a batch."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(8):
        layers += [nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)]
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(128, 4, 256, batch_first=True), 4)
    return {
        "perceptron 64-128-128-10": (
            nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)),
            lambda: torch.randn(8, 64),
        ),
        "9 convolutions, 32 x 32": (
            nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
            lambda: torch.randn(8, 3, 32, 32),
        ),
        "4 transformer layers, 64": (nn.Sequential(encoder, nn.Linear(128, 10)), lambda: torch.randn(8, 64, 128)),
    }


def training(model: nn.Module, make_batch: Callable[[], Tensor]) -> Callable[[], None]:
    """Eight updates of four micro-batches, from a DataLoader."""
    batch = make_batch()
    rows = batch.repeat(NUM_UPDATES * NUM_MICRO_BATCHES, *[1] * (batch.dim() - 1))

    def train() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for i, x in enumerate(torch.utils.data.DataLoader(rows, batch_size=len(batch))):
            output = model(x).flatten(0, -2)
            (F.cross_entropy(output, torch.zeros(len(output), dtype=torch.long)) / NUM_MICRO_BATCHES).backward()
            if (i + 1) % NUM_MICRO_BATCHES == 0:
                optimizer.step()
                optimizer.zero_grad()

    return train


def recorded(train: Callable[[], None]) -> None:
    """The same under a new recorder, with all hooks."""
    guard = Guard()
    patches = Patches(guard)
    record(Path(__file__), Stop(NUM_UPDATES + 1), patches)
    try:
        train()
    finally:
        patches.close()
    assert guard.failure is None


if __name__ == "__main__":
    main()
