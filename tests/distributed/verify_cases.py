"""Models that `gradfold.verify` tries out on several ranks, each rank with rows of its own."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gradfold

ROWS = 11  # 6 + 5, or 4 + 4 + 3


def perceptron(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1)).double()


def rows_of(rank, size):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64) + 1e4
    batch = {"x": x, "y": torch.randn(ROWS, 1, generator=generator).double(), "count": 1.0 + torch.arange(ROWS) % 4}
    return {name: torch.tensor_split(one, size)[rank] for name, one in batch.items()}


def counted(model, batch):
    errors = F.mse_loss(model((batch["x"] - 1e4) / 3), batch["y"], reduction="none").squeeze(1) * batch["count"]
    return errors.sum() / batch["count"].sum()


def by_name(model, batch):
    return counted(model["net"], batch)


def by_rank(model, batch):
    return counted(model, batch) * (1 + torch.distributed.get_rank())


def failing_on_the_last(model, batch):
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1 > 0:
        raise LookupError("ill")
    return counted(model, batch)


def weigh(batch):
    return batch["count"].sum()


def attempt(loss_fn, rank, size, model, weight=weigh):
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, weight=weight)
    try:
        return gradfold.verify(accumulator, rows_of(rank, size))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def verify_all(rank, size):
    sharded = perceptron()
    fully_shard(sharded)
    trained = DistributedDataParallel(perceptron())
    counted(trained, rows_of(rank, size)).backward()
    before = [parameter.grad.clone() for parameter in trained.parameters()]
    state = torch.get_rng_state()
    verdicts = {
        "right": attempt(counted, rank, size, trained),
        "wrong weight": attempt(counted, rank, size, DistributedDataParallel(perceptron()), "samples"),
        "inside": attempt(by_name, rank, size, nn.ModuleDict({"net": DistributedDataParallel(perceptron())})),
        "dropout": attempt(counted, rank, size, DistributedDataParallel(perceptron(0.5))),
        "by rank": attempt(by_rank, rank, size, DistributedDataParallel(perceptron())),
        "failing": attempt(failing_on_the_last, rank, size, DistributedDataParallel(perceptron())),
        "sharded": attempt(counted, rank, size, sharded),
    }
    assert all(torch.equal(one.grad, old) for one, old in zip(trained.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    return verdicts
