"""A micro-batch that sets itself where parameters are sharded: ranks try the same sizes together."""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from unittest import mock

import torch
from distributed.ddp_cases import cut, perceptron, regression, regression_batch, rows_of
from distributed.fsdp_cases import shard, whole
from distributed.scenarios import outcome

import gradfold
from gradfold.distributed import process_group as company

QUICK = gradfold.Auto(seconds=0.5, cache=False)


def runaway_clock(rank):
    """A clock that, read by one rank for itself, would have it end its search while others go on."""
    ticks = itertools.count()
    is_wrong = mock.patch.object(company.time, "perf_counter", lambda: 10.0 * next(ticks))
    return is_wrong if rank else contextlib.nullcontext()


def run_cases(rank, size, reduce):
    rows = cut(regression_batch(), rows_of(rank, size))

    model = shard(perceptron(), size)
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=QUICK, fsdp_reduce=reduce)
    torch.manual_seed(rank)
    before = [one.to_local().detach().clone() for one in model.parameters()], torch.get_rng_state()
    with runaway_clock(rank):
        choice = accumulator.tune(rows)
    torch.testing.assert_close(before[0], [one.to_local().detach() for one in model.parameters()], rtol=0, atol=0)
    assert torch.equal(before[1], torch.get_rng_state())
    assert all(one.grad is None for one in model.parameters())

    training = shard(perceptron(), size)
    accumulator = gradfold.Accumulator(training, regression, micro_batch_size=QUICK, fsdp_reduce=reduce)
    accumulator.backward(rows)
    accumulator.backward(rows)
    return {
        "chosen": (choice.micro_batch_size, [timing.micro_batch_size for timing in choice.timings]),
        "predicted": choice.peak_bytes,
        "sum of two": whole(training),
        "size": accumulator.micro_batch_choice.micro_batch_size,
    }


def caches(rank, size):
    """What was chosen before counts where all ranks have it."""
    rows = cut(regression_batch(), [range(12), range(12)][rank])
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for is_kept in (True, rank == 0, True):
            with mock.patch.dict(os.environ, GRADFOLD_CACHE_DIR=folder if is_kept else ""):
                accumulator = gradfold.Accumulator(
                    shard(perceptron(), size), regression, micro_batch_size=gradfold.Auto(seconds=0.05, memory="4GiB")
                )
                accumulator.backward(rows)
                found.append(
                    (accumulator.micro_batch_choice.is_cached, accumulator.micro_batch_choice.micro_batch_size)
                )
    return found


def failures(rank, size):
    """One rank cannot begin, or nothing fits there."""
    rows = cut(regression_batch(), rows_of(rank, size))

    def backward(option, batch):
        accumulator = gradfold.Accumulator(shard(perceptron(), size), regression, micro_batch_size=option)
        return outcome(lambda: accumulator.backward(batch)), outcome(lambda: accumulator.tune(batch))

    return {
        "no room": backward(gradfold.Auto(memory="1KiB" if rank else None, cache=False), rows),
        "no batch": backward(QUICK, rows if rank else (rows[0], rows[1][:0])),
    }
