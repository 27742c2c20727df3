"""The workload `scalar`: one weight and two micro-batches, small enough to check by hand."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from gradfold.workloads.workload import Workload

__all__: list[str] = []

DESCRIPTION = "one weight that learns y = 2x from x = 4 and x = 2; small enough to check by hand"
DATA = "synthetic"


class Scalar(nn.Module):
    """y = weight * x, with the weight at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B,) -> (B,)
        return self.weight * x


def squared_error(model: nn.Module, micro_batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean squared error of (x, y)."""
    x, y = micro_batch
    return F.mse_loss(model(x), y)


def weight_value(model: nn.Module) -> dict[str, float]:
    """The weight itself, which ought to become 2."""
    return {"weight": next(model.parameters()).item()}


def scalar() -> Workload:
    """One weight at 1, y = 2x, squared error, SGD 0.01.

    The loss (w x - y)^2 has the gradient 2 x (w x - y): -32 for x = 4 and -8 for x = 2. Each is half of the global
    batch, so the accumulated gradient reads -16 after the first micro-batch and -20 after the second, and the weight
    becomes 1.2.
    """
    x = torch.tensor([4.0, 2.0])
    return Workload(
        name="scalar",
        description=DESCRIPTION,
        make_model=Scalar,
        loss_fn=squared_error,
        make_optimizer=partial(torch.optim.SGD, lr=0.01),
        train_data=(x, 2 * x),
        global_batch_size=2,
        micro_batch_size=1,
        shuffle=False,
        evaluate=weight_value,
        facts={"data": "x = 4, 2 and y = 2x", "training samples": "2"},
    )
