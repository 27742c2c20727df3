"""Arms of `gradfold compare` on several ranks, in one process each, which is what its children do in theirs."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gradfold import Workload
from gradfold.compare.arms import ARMS
from gradfold.compare.data import Sizes
from gradfold.compare.experiment import Experiment
from gradfold.compare.results import Tensors, load
from gradfold.distributed.process_group import ProcessGroup

ROWS, GLOBAL_BATCH, MICRO_BATCH = 22, 8, 2  # windows of 8, 8 and 6 rows
ON_ALL = ("gradfold", "plain-loop", "small-batch")


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def mean_of_counted(model, batch):
    """A mean over counts that differ from row to row, so that ranks and micro-batches weigh differently."""
    errors = F.mse_loss(model(batch["x"]), batch["y"], reduction="none").squeeze(1) * batch["count"]
    return errors.sum() / batch["count"].sum()


def count(batch):
    return batch["count"].sum()


def workload(fails_on=None):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(ROWS, 3, generator=generator)
    counts = 1.0 + 7.0 * (torch.arange(ROWS) % 3 == 0)
    return Workload(
        name="counted",
        description="a mean over counts",
        make_model=network,
        loss_fn=mean_of_counted,
        make_optimizer=partial(torch.optim.SGD, lr=0.05),
        train_data={"x": x, "y": x.square().sum(1, keepdim=True), "count": counts},
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        num_epochs=2,
        weight=count,
        shuffle=False,
    )


def ill_on_rank_1():
    """What the command line's tests train to see a rank fail."""

    def loss_fn(model, batch):
        if os.environ.get("RANK") == "1":
            raise LookupError("rank one is ill")
        return mean_of_counted(model, batch)

    return dataclasses.replace(workload(), loss_fn=loss_fn)


def train(arm, ranks):
    """An arm to its end: what it measured and left."""
    with tempfile.TemporaryDirectory() as name:
        sizes = Sizes(ROWS, GLOBAL_BATCH, MICRO_BATCH, num_epochs=2, num_ranks=1 if ranks is None else ranks.size)
        measured = Experiment(workload(), ARMS[arm], sizes, 0, Path(name), ranks).run(lambda *_: None)
        left = {key: load(Path(name), key) for key in vars(Tensors).values() if isinstance(key, str)}
    return measured, left


def train_arms(rank, size):
    ranks = ProcessGroup(torch.distributed.group.WORLD, torch.device("cpu"))
    return {arm: train(arm, ranks) for arm in ON_ALL}
