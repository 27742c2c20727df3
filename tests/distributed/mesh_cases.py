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
