"""Two-phase losses and keyed dropout on several ranks; each function runs on all of them."""

from __future__ import annotations

import torch
from distributed.ddp_cases import numbers
from distributed.scenarios import outcome
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradfold

ROWS = 17
SIZES = (4, 1, None)


class Towers(nn.Module):
    def __init__(self, drop=0.0):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(drop), nn.Linear(8, 4))
        self.second = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(drop), nn.Linear(8, 4))
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch):
        return self.first(batch[0]), self.second(batch[1])


def towers(drop=0.0):
    torch.manual_seed(0)
    return gradfold.convert_dropout(Towers(drop).double())


def batch():
    return numbers(ROWS, 5, seed=1), numbers(ROWS, 6, seed=2), torch.arange(ROWS) > 5


def own_rows(rank, size):
    bounds = [0, *[12, 14][: size - 1], ROWS]
    return tuple(part[bounds[rank] : bounds[rank + 1]] for part in batch())


def embed(model, batch):
    return {"pair": model(batch), "label": batch[2]}


def contrast(model, statistics):
    model = getattr(model, "module", model)
    loss = gradfold.losses.info_nce(*statistics["pair"], temperature=(-model.log_scale).exp(), tile=5)
    # The last tower's weights are in both phases.
    loss = {"match": loss, "decay": 0.01 * model.second[0].weight.square().sum()}
    rows = statistics["pair"][0].sum(1)
    return loss, {"rows": rows, "share": statistics["label"].double().mean()}


def moments(model, batch):
    z, _ = model(batch)
    return {"num": len(z), "sum": z.sum(0), "products": z.T @ z, "labels": batch[2].long().sum()}


def covariance(model, sums):
    assert not sums["labels"].is_floating_point() and int(sums["labels"]) == ROWS - 6
    mean = sums["sum"] / sums["num"]
    return (sums["products"] / sums["num"] - mean[:, None] * mean).triu().square().sum()


INFO_NCE = gradfold.TwoPhaseLoss(embed, contrast)
COVARIANCE = gradfold.TwoPhaseLoss(moments, covariance, combine="sum")


def gradients(model):
    return {
        name.removeprefix("module."): one.grad.clone() for name, one in model.named_parameters() if one.grad is not None
    }


def window(rank, size, loss_fn, sizes=SIZES, drop=0.0, **options):
    model = DistributedDataParallel(towers(drop))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=sizes[rank], **options)
    result = accumulator.backward(own_rows(rank, size))
    metrics = {name: value.clone() for name, value in result.metrics.items()}
    return gradients(model), result.loss.clone(), metrics, [str(one) for one in result.recoveries]


def out_of_memory(rank, size):
    """The last rank can run two rows with a graph: it has sent its statistics when it finds out."""

    def statistic(model, batch):
        if rank == size - 1 and torch.is_grad_enabled() and len(batch[0]) > 2:
            raise torch.OutOfMemoryError("too many rows")
        return embed(model, batch)

    loss_fn = gradfold.TwoPhaseLoss(statistic, contrast)
    return window(rank, size, loss_fn, sizes=(4, None, None), drop=0.3, self_check=False)


def fails(rank, size, when):
    """One rank fails for good in a phase; then all train on."""
    model = DistributedDataParallel(towers())
    is_on = True

    def statistic(model, batch):
        if is_on and rank == 0 and (when == "sweep" or (when == "replay" and torch.is_grad_enabled())):
            raise KeyError(when)
        return embed(model, batch)

    def loss(model, statistics):
        if is_on and rank == 0 and when == "loss":
            raise KeyError(when)
        return contrast(model, statistics)

    accumulator = gradfold.Accumulator(
        model, gradfold.TwoPhaseLoss(statistic, loss), micro_batch_size=2, self_check=False
    )
    first = outcome(lambda: accumulator.backward(own_rows(rank, size)))
    left = gradients(model)
    is_on = False
    accumulator.backward(own_rows(rank, size))
    return first, left, gradients(model)


def unlike(rank, size):
    """Statistics that do not go together."""
    loss_fn = gradfold.TwoPhaseLoss(
        lambda model, batch: model(batch)[0][:, : 2 + rank], lambda model, z: z.square().mean()
    )
    return outcome(lambda: window(rank, size, loss_fn, self_check=False))


def dropped(rank, size):
    """A mean over rows, with dropout: the masks are those of the rows of all ranks."""
    return window(rank, size, lambda model, batch: model(batch)[0].square().mean(), drop=0.4)


def run_all(rank, size):
    return {
        "info_nce": window(rank, size, INFO_NCE),
        "whole": window(rank, size, INFO_NCE, sizes=(None,) * 3),
        "covariance": window(rank, size, COVARIANCE),
        "dropout": window(rank, size, INFO_NCE, drop=0.3),
        "out of memory": out_of_memory(rank, size),
        "sweep": fails(rank, size, "sweep"),
        "loss": fails(rank, size, "loss"),
        "replay": fails(rank, size, "replay"),
        "unlike": unlike(rank, size),
        "dropped": dropped(rank, size),
    }


def expect(loss_fn, drop=0.0):
    """One process with all rows, in plain torch."""
    model = towers(drop)
    with gradfold.counter_based_dropout(model, update=0, num_rows=ROWS):
        output = loss_fn(model, batch())
    loss = output[0] if isinstance(output, tuple) else output
    loss = sum(loss.values()) if isinstance(loss, dict) else loss
    loss.backward()
    return gradients(model), loss.detach()
