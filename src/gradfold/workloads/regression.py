"""The workloads on regression: `linear`, the smallest that learns, and `scalar`, small enough to check by hand."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradfold.workloads.registry import BUILT_IN
from gradfold.workloads.scoring import mean_scores
from gradfold.workloads.workload import Workload

_NUM_TRAIN, _NUM_TEST = 1600, 400
_NOISE = 0.1


def squared_error(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of (x, y)."""
    x, y = micro_batch
    return F.mse_loss(model(x), y)


def held_out_error(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """Mean squared error on held-out rows; the noise leaves 0.01 of it to the best weight."""
    return {"mse": mean_scores(model, squared_error, [(x, y)], lambda batch: len(x))["loss"]}


def linear() -> Workload:
    """Regression onto a known weight plus noise: 100 micro-batches an epoch, 4 to an update."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 1, generator=generator)
    x = torch.randn(_NUM_TRAIN + _NUM_TEST, 10, generator=generator)
    y = x @ weight + 1.0 + _NOISE * torch.randn(len(x), 1, generator=generator)
    return Workload(
        name="linear",
        description=BUILT_IN["linear"].text,
        make_model=partial(nn.Linear, 10, 1),
        loss_fn=squared_error,
        make_optimizer=partial(torch.optim.SGD, lr=0.1),
        train_data=(x[:_NUM_TRAIN], y[:_NUM_TRAIN]),
        global_batch_size=64,
        micro_batch_size=16,
        evaluate=partial(held_out_error, x=x[_NUM_TRAIN:], y=y[_NUM_TRAIN:]),
        facts={
            "data": f"synthetic: 10 normal inputs, a fixed weight, noise of deviation {_NOISE}",
            "training samples": f"{_NUM_TRAIN:,}",
            "held-out samples": f"{_NUM_TEST:,}",
        },
    )


class Scalar(nn.Module):
    """y = weight * x, with the weight at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:  # (B,) -> (B,)
        return self.weight * x


def scalar() -> Workload:
    """One weight at 1, y = 2x, squared error, SGD 0.01.

    The loss (w x - y)^2 has the gradient 2 x (w x - y): -32 for x = 4 and -8 for x = 2. Each is half of the global
    batch, so the accumulated gradient reads -16 after the first micro-batch and -20 after the second, and the weight
    becomes 1.2.
    """
    x = torch.tensor([4.0, 2.0])
    return Workload(
        name="scalar",
        description=BUILT_IN["scalar"].text,
        make_model=Scalar,
        loss_fn=squared_error,
        make_optimizer=partial(torch.optim.SGD, lr=0.01),
        train_data=(x, 2 * x),
        global_batch_size=2,
        micro_batch_size=1,
        shuffle=False,
        evaluate=lambda model: {"weight": next(model.parameters()).item()},  # which ought to become 2
        facts={"data": "x = 4, 2 and y = 2x", "training samples": "2"},
    )
