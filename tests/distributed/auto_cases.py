"""A micro-batch that sets itself on several ranks: each finds its own; what fails on one ends the window on all."""

from __future__ import annotations

import os
from dataclasses import replace
from unittest import mock

import torch
from distributed.ddp_cases import CASES, cut, gradients, perceptron, regression, regression_batch, rows_of
from distributed.scenarios import outcome
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradfold
from gradfold.memory import auto_tune as sizer

QUICK = gradfold.Auto(seconds=0.05, cache=False)
NAMES = [name for name in CASES if name != "whole batches" and not name.startswith("compiled")]


def auto_of(option):
    """The option of a case that has its size found, as an argument."""
    if isinstance(option, gradfold.TokenBudget):
        return {"batching": replace(option, max_tokens="auto")}
    return {"micro_batch_size": QUICK}


def taking(size):
    """Has a search end with this size, however the machine is."""
    return mock.patch.object(sizer, "choose", lambda timings: replace(timings[0], micro_batch_size=size))


def own_rows(rank, size):
    return cut(regression_batch(), rows_of(rank, size))


def run_case(rank, size, name):
    """Every rank takes another size; gives the gradients and the sizes that were run."""
    case = CASES[name]
    model = case.wrap(case.model())
    if case.found:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    accumulator = gradfold.Accumulator(
        model, case.loss_fn, self_check=False, **auto_of(case.micro_batch_sizes[rank]), **case.options
    )
    with taking((1, 2, 5)[rank]):
        accumulator.backward(cut(case.batch(), rows_of(rank, size)))
    return gradients(model), accumulator.micro_batch_choice.micro_batch_size


class Recurrent(nn.Module):
    """Whose memory is found by runs of real rows, of a copy of the wrapped model."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cells = nn.LSTM(3, 4, batch_first=True)
        self.last = nn.Linear(4, 1)
        self.double()

    def forward(self, x):
        return self.last(self.cells(x[:, None])[0][:, 0])


def probes(rank, size):
    """Runs of copies, whose backward passes must not reduce either."""
    model = DistributedDataParallel(Recurrent())
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=QUICK)
    with taking(2 + rank):
        accumulator.backward(own_rows(rank, size))
    return gradients(model), accumulator.micro_batch_choice.peak_bytes


def one_rank_searches(rank, size):
    """The others have a choice already, from a state."""
    model = DistributedDataParallel(perceptron())
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=QUICK)
    if rank:
        other = gradfold.Accumulator(model.module, regression, micro_batch_size=QUICK, distributed=False)
        other.tune(own_rows(rank, size))
        accumulator.load_state_dict(other.state_dict())
    accumulator.backward(own_rows(rank, size))
    return gradients(model), accumulator.micro_batch_choice is not None


def chosen_on_one_rank(rank, size):
    """Rank 1 chooses before the first window, without the others; buffers differ between ranks, and stay so."""
    model = DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double())
    model.module[0].running_mean.fill_(float(rank))
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=QUICK, batch_norm="per_micro_batch")
    if rank == 1:
        accumulator.tune(own_rows(rank, size))
    means = model.module[0].running_mean.clone()
    accumulator.backward(own_rows(rank, size))
    return means, accumulator.micro_batch_choice.micro_batch_size


def memory_for_none(rank, size):
    """On the last rank not one row fits; the window after it has sizes that were given."""
    model = DistributedDataParallel(perceptron())
    auto = replace(QUICK, memory="300MiB" if rank == size - 1 else "4GiB")
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=auto)
    twice = [outcome(lambda: accumulator.backward(own_rows(rank, size))) for _ in range(2)]
    is_clean = all(parameter.grad is None for parameter in model.parameters())
    gradfold.Accumulator(model, regression, micro_batch_size=2).backward(own_rows(rank, size))
    return twice, is_clean, gradients(model)


def memory_that_runs_out(rank, size):
    """While sizes are timed on the last rank, which then takes what fitted."""
    model = DistributedDataParallel(perceptron())

    def loss_fn(model, batch):
        if rank == size - 1 and len(batch[0]) > 4:
            raise torch.OutOfMemoryError("too many rows")
        return regression(model, batch)

    auto = replace(QUICK, seconds=1.0)  # time to come to eight rows
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=auto)
    accumulator.backward(own_rows(rank, size))
    return gradients(model), accumulator.micro_batch_choice.largest_fitting


def a_loss_that_fails(rank, size):
    """Of one rank, at once."""
    model = DistributedDataParallel(perceptron())

    def loss_fn(model, batch):
        if rank == 0:
            raise KeyError("no such key")
        return regression(model, batch)

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=QUICK)
    return outcome(lambda: accumulator.backward(own_rows(rank, size)))


SCENARIOS = {
    "probes": probes,
    "one rank searches": one_rank_searches,
    "chosen on one rank": chosen_on_one_rank,
    "memory for none": memory_for_none,
    "memory that runs out": memory_that_runs_out,
    "a loss that fails": a_loss_that_fails,
}


def run_all(rank, size):
    """Cases and scenarios, errors as their names and texts."""
    os.environ["GRADFOLD_CACHE_DIR"] = ""
    found = {name: outcome(lambda name=name: run_case(rank, size, name)) for name in NAMES}
    return found | {name: outcome(lambda one=one: one(rank, size)) for name, one in SCENARIOS.items()}
