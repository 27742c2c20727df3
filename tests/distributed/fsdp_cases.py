"""Trainings whose parameters are sharded over ranks, on a mesh of CPUs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from distributed.ddp_cases import (
    ROWS,
    TOKENS,
    Tagger,
    cut,
    numbers,
    perceptron,
    regression,
    regression_batch,
    rows_of,
    tagging,
    tagging_batch,
    two_terms,
)
from distributed.scenarios import outcome
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import gradfold

MICRO_BATCH_SIZES = (2, 5, 1, 3)


def rare_everywhere():
    """fully_shard sums the gradients of a layer together, so that every rank must use the same of its parameters."""
    batch = tagging_batch()
    batch["is_rare"][:] = 1.0
    return batch


def mesh_of(size):
    """Shards on all ranks; with four, on two pairs that hold the same (HSDP)."""
    if size == 4:
        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh("cpu", (size,))


def shard(model, size, **options):
    mesh = mesh_of(size)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and isinstance(model, nn.Sequential):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


CASES = {
    "samples": (perceptron, regression_batch, regression, {}),
    "tokens, shared, frozen and unused parameters": (Tagger, rare_everywhere, tagging, {"weight": TOKENS}),
    "two terms": (
        Tagger,
        rare_everywhere,
        two_terms,
        {"weight": {"tokens": TOKENS, "rows": "samples", "spread": "samples"}},
    ),
}


def whole(model):
    return {
        name: None if one.grad is None else one.grad.full_tensor().clone() for name, one in model.named_parameters()
    }


def run_cases(rank, size, reduce):
    """Every case: gradients, loss, metrics."""
    results = {}
    for name, (make, batch, loss_fn, options) in CASES.items():
        model = shard(make(), size)
        accumulator = gradfold.Accumulator(
            model, loss_fn, micro_batch_size=MICRO_BATCH_SIZES[rank], fsdp_reduce=reduce, **options
        )
        result = accumulator.backward(cut(batch(), rows_of(rank, size)))
        metrics = {key: value for key, value in result.metrics.items() if value.dim() == 0}
        results[name] = whole(model), result.loss.clone(), metrics
    return results


def expect(name):
    """One process with the whole batch, in plain torch."""
    make, batch, loss_fn, _ = CASES[name]
    model = make()
    output = loss_fn(model, batch())
    loss, metrics = output if isinstance(output, tuple) else (output, {})
    loss = sum(loss.values()) if isinstance(loss, dict) else loss
    loss.backward()
    return {name: one.grad for name, one in model.named_parameters()}, loss.detach(), metrics


def scenarios(rank, size):
    """Other windows over shards."""
    batch = cut(regression_batch(), rows_of(rank, size))

    model = shard(perceptron(), size)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step = gradfold.TrainStep(gradfold.Accumulator(model, regression, micro_batch_size=3), optimizer, max_grad_norm=0.1)
    for _ in range(3):
        result = step(batch)
    trained = {name: one.full_tensor().detach().clone() for name, one in model.named_parameters()}

    found = shard(perceptron(), size)
    accumulator = gradfold.Accumulator(found, regression, micro_batch_size=4)
    accumulator.backward(batch)
    accumulator.backward(batch)

    evaluated = fully_shard(perceptron(), mesh=mesh_of(size))
    accumulator = gradfold.Accumulator(evaluated, regression, micro_batch_size=4)
    for _ in range(2):
        with torch.no_grad():
            evaluated(batch[0])  # leaves the outermost parameters whole
        accumulator.backward(batch)

    ignoring = perceptron()
    fully_shard(ignoring, mesh=mesh_of(size), ignored_params={ignoring[0].bias})

    bad = numbers(*batch[0].shape), batch[1].clone()
    if rank == size - 1:
        bad[1][0] = float("nan")
    refused = outcome(lambda: gradfold.Accumulator(shard(perceptron(), size), regression).backward(bad))
    skipping = shard(perceptron(), size)
    skipped = gradfold.Accumulator(skipping, regression, on_non_finite="skip_update").backward(bad)

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mixed = shard(perceptron().float(), size, mp_policy=policy)
    gradfold.Accumulator(mixed, lambda model, batch: regression(model, [part.float() for part in batch])).backward(
        batch
    )

    return {
        "trained": trained,
        "grad_norm": result.grad_norm,
        "found": whole(found),
        "evaluated": whole(evaluated),
        "ignored": outcome(lambda: gradfold.Accumulator(ignoring, regression).backward(batch)),
        "refused": refused,
        "skipped": (skipped.is_skipped, [one.grad is None for one in skipping.parameters()]),
        "mixed": whole(mixed),
        "left out": outcome(
            lambda: gradfold.Accumulator(
                shard(perceptron(), size), regression, on_non_finite="skip_micro_batch"
            ).backward(batch)
        ),
        "bad batch": outcome(
            lambda: gradfold.Accumulator(shard(perceptron(), size), regression, micro_batch_size=2).backward(
                (batch[0], batch[1][:0]) if rank == 0 else batch
            )
        ),
        "ranks": dist.get_world_size(),
        "rows": ROWS,
    }
