"""Four processes of which two share their data: a device mesh of 2 data-parallel by 2 tensor-parallel ranks."""

from __future__ import annotations

import torch
from distributed.ddp_cases import cut, regression, regression_batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import gradfold

ROWS_OF = {0: slice(0, 15), 1: slice(15, 23)}  # by data-parallel rank


def whole(model):
    def full(gradient):
        return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()

    return {name.removeprefix("module."): full(one.grad) for name, one in model.named_parameters()}


def even_perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def run_cases(rank, size):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    batch = cut(regression_batch(), ROWS_OF[mesh["data"].get_local_rank()])
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    models = {
        "DistributedDataParallel": DistributedDataParallel(even_perceptron(), process_group=mesh["data"].get_group()),
        "fully_shard": fully_shard(even_perceptron(), mesh=mesh["data"]),
        "fully_shard of tensor-parallel layers": fully_shard(
            parallelize_module(even_perceptron(), mesh["tensor"], plan), mesh=mesh["data"]
        ),
    }
    results = {}
    for name, model in models.items():
        result = gradfold.Accumulator(model, regression, micro_batch_size=4).backward(batch)
        results[name] = whole(model), result.loss.clone(), result.weight, result.num_micro_batches
    return results


def expect():
    model = even_perceptron()
    loss = regression(model, regression_batch())
    loss.backward()
    return {name: one.grad for name, one in model.named_parameters()}, loss.detach()


# --- Tensor-parallel ranks that are not data-parallel: one batch, a part of the parameters on each


def summed(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1], reduction="sum")


def centered(model, batch):
    return nn.functional.mse_loss(model(batch[0] - batch[0].mean(0)), batch[1])


def broken_on_one(model, batch):
    """The gradient of the first rank's part of one parameter is NaN, the loss is not."""
    loss = regression(model, batch)
    return loss + (model[0](batch[0]) * 0).abs().sqrt().mean() if torch.distributed.get_rank() == 0 else loss


TENSOR_PARALLEL = {"right": regression, "a sum": summed, "coupled": centered, "not finite on one rank": broken_on_one}


def tensor_parallel(rank, size):
    """Of each loss the gradient or the error, the next gradient of a right one, and what `verify` says."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("only tensor",))
    batch = cut(regression_batch(), slice(0, 12))
    results = {}
    for name, loss_fn in TENSOR_PARALLEL.items():
        model = parallelize_module(even_perceptron(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        try:
            gradfold.Accumulator(model, loss_fn, micro_batch_size=4, distributed=False).backward(batch)
            found = whole(model)
        except gradfold.GradfoldError as error:
            found = type(error).__name__, str(error)
        model.zero_grad()
        gradfold.Accumulator(model, regression, micro_batch_size=5, distributed=False).backward(batch)
        following = whole(model)
        verdict = None
        if name != "not finite on one rank":
            verdict = gradfold.verify(gradfold.Accumulator(model, loss_fn, distributed=False), batch)
            verdict = verdict.ok, [cause.name for cause in verdict.causes], verdict.max_relative_error
        results[name] = found, following, verdict
    return results


def expect_tensor_parallel():
    model = even_perceptron()
    regression(model, cut(regression_batch(), slice(0, 12))).backward()
    return {name: one.grad for name, one in model.named_parameters()}
