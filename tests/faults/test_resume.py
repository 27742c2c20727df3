"""Stop and resume: a run that was interrupted, at whatever moment, is bitwise the one that was not."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import warnings
from typing import ClassVar

import pytest
import torch
from faults.resumable_run import (
    NUM_BATCHES,
    NUM_BATCHES_OF_KILLED,
    NUM_KILLS,
    NUM_SAMPLES,
    PATIENCE,
    Run,
    from_bytes,
    in_bytes,
)
from torch import nn
from torch.utils import _pytree as pytree

import gradfold
import gradfold.batch.split

F = nn.functional


def same(found, expected):
    """Bitwise, in the same nesting."""
    (ours, our_nesting), (theirs, their_nesting) = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    return our_nesting == their_nesting and all(map(same_leaf, ours, theirs))


def same_leaf(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    return type(a) is type(b) and (a == b or a != a)


def outcome(result):
    return [result.loss, result.applied, result.grad_norm, result.num_micro_batches, list(map(str, result.recoveries))]


def history(run):
    """What every batch gave, and the whole state after it, as it is read from a file."""
    return [(outcome(result), from_bytes(in_bytes(run.state_dict()))) for result in run]


@pytest.fixture(scope="module", autouse=True)
def patience():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradfold.batch.split, "_PATIENCE", PATIENCE)
        yield


@pytest.fixture(scope="module")
def unbroken(patience):
    next(iter(Run()))  # what is imported on the way
    return history(Run())


def test_the_run_meets_every_fault(unbroken):
    """Else what follows would show little."""
    outcomes = [outcome for outcome, _ in unbroken]
    applied = [applied for _, applied, *_ in outcomes]
    assert 2 <= applied.count(False) < NUM_BATCHES // 2
    starts = [index for index, (*_, recoveries) in enumerate(outcomes) if recoveries]
    assert starts[0] == 0
    assert len(starts) >= 3, "twice as many rows are tried, and fail, again and again"
    sizes = [state["step"]["accumulator"]["micro_batcher"]["fitting_size"] for _, state in unbroken]
    assert {size["rows"] for size in sizes} >= {10, 20}
    assert len({size["patience"] for size in sizes}) >= 2
    assert len({size["quiet"] for size in sizes}) >= 3
    assert unbroken[-1][1]["step"]["samples"] > 4 * NUM_SAMPLES
    assert len({state["step"]["accumulator"]["grad_scaler"]["scale"] for _, state in unbroken}) >= 3


@pytest.mark.parametrize("stop", range(NUM_BATCHES))
def test_a_run_resumed_at_any_update_boundary_is_the_unbroken_one(unbroken, stop):
    state = unbroken[stop - 1][1] if stop else Run().state_dict()
    resumed = Run(seed=1)
    resumed.load_state_dict(from_bytes(in_bytes(state)))
    assert same(history(resumed), unbroken[stop:])


def test_a_run_stopped_at_every_boundary_is_the_unbroken_one(unbroken):
    state, found = in_bytes(Run().state_dict()), []
    for seed in range(NUM_BATCHES):
        resumed = Run(seed)
        resumed.load_state_dict(from_bytes(state))
        result = next(iter(resumed))
        state = in_bytes(resumed.state_dict())
        found.append((outcome(result), from_bytes(state)))
    assert same(found, unbroken)


@pytest.mark.parametrize(
    "place",
    [
        ("model",),
        ("optimizer",),
        ("random",),
        ("step", "samples"),
        ("step", "updates"),
        ("step", "scheduler"),
        ("step", "accumulator", "num_windows"),
        ("step", "accumulator", "micro_batcher", "fitting_size"),
        ("step", "accumulator", "grad_scaler"),
    ],
    ids=".".join,
)
def test_no_part_of_the_state_can_be_left_out(unbroken, place):
    """The tests above see each of them."""
    stop = 5
    state, fresh = copy.deepcopy(unbroken[stop - 1][1]), from_bytes(in_bytes(Run(seed=1).state_dict()))
    into = state
    for name in place[:-1]:
        into, fresh = into[name], fresh[name]
    into[place[-1]] = fresh[place[-1]]
    resumed = Run(seed=1)
    resumed.load_state_dict(state)
    assert not same(history(resumed), unbroken[stop:])


def test_the_quiet_windows_of_both_parts_of_a_run_add_up():
    """The size that was learned is given up after the resume, at the window where the unbroken run gives it up."""
    sizes = []

    def loss_fn(model, batch):
        sizes.append(len(batch))
        if len(batch) > 4 and len(sizes) < 3:
            raise torch.OutOfMemoryError("for a while")
        return model(batch).square().mean()

    def fresh():
        return gradfold.Accumulator(nn.Linear(2, 1), loss_fn, self_check=False)

    first, batch = fresh(), torch.randn(8, 2)
    for _ in range(1 + PATIENCE - 1):  # one with a fault, and all but one of those without
        first.backward(batch)
    second = fresh()
    second.load_state_dict(from_bytes(in_bytes(first.state_dict())))
    numbers = [second.backward(batch).num_micro_batches for _ in range(2)]
    assert numbers == [2, 1]


def shuffling(model, batch):
    """Nobody can know what it does to a part of the batch."""
    order = torch.randperm(len(batch))
    return model(batch[order]).square().mean()


def accumulator_for(loss_fn, model=None):
    return gradfold.Accumulator(nn.Linear(4, 3) if model is None else model, loss_fn, micro_batch_size=8)


def test_what_the_guard_has_said_it_does_not_say_again_after_a_resume():
    batch = torch.randn(16, 4)
    first = accumulator_for(shuffling)
    with pytest.warns(RuntimeWarning, match="cannot know"):
        first.backward(batch)
    second = accumulator_for(shuffling)
    second.load_state_dict(from_bytes(in_bytes(first.state_dict())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.backward(batch)
    third = accumulator_for(shuffling)
    third.load_state_dict(from_bytes(in_bytes(second.state_dict())))  # of a run that was itself resumed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third.backward(batch)


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 9])
def test_an_undecided_guard_looks_at_the_same_windows_after_a_resume(stop):
    batch = torch.ones(16, 4)  # rows that are all alike decide nothing

    class Calls:  # on a class, which snapshots do not follow: a list in a closure is put back after each check
        sizes: ClassVar[list[int]] = []

    calls = Calls.sizes

    def loss_fn(model, batch):
        Calls.sizes.append(len(batch))
        return F.mse_loss(model(batch), torch.ones(len(batch), 3))

    def looks(accumulator, num_windows):
        found = []
        for _ in range(num_windows):
            calls.clear()
            accumulator.backward(batch)
            found.append(len(calls) > 2)
        return found

    unbroken = looks(accumulator_for(loss_fn), 10)
    assert [index + 1 for index, is_looked_at in enumerate(unbroken) if is_looked_at] == [1, 2, 4, 8]
    first = accumulator_for(loss_fn)
    before = looks(first, stop)
    second = accumulator_for(loss_fn)
    second.load_state_dict(from_bytes(in_bytes(first.state_dict())))
    assert before + looks(second, 10 - stop) == unbroken


def test_a_state_does_not_move_with_the_run():
    run = Run()
    next(iter(run))
    state = run.step.accumulator.state_dict()
    before = copy.deepcopy(state)
    list(run)
    assert state == before


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork") or not hasattr(signal, "SIGKILL"), reason="needs fork and SIGKILL")
def test_a_process_killed_twenty_times_ends_as_the_one_left_alone(tmp_path):
    """It is killed at its start, in a window, with half a file written, before the new file has its name, and at random
    moments. The checkpoint can be read at every halt and after every kill."""
    program = [sys.executable, "-W", "error", "-m", "faults.resumable_run", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    kills = json.loads(ended.stdout)
    assert len(kills) == NUM_KILLS
    assert {where for where, _ in kills} >= {"start", "built", "micro-batch", "half written", "not renamed", "saved"}
    assert 0 < kills[-1][1] < NUM_BATCHES_OF_KILLED
    killed, unbroken = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("killed", "unbroken"))
    assert len(unbroken["losses"]) == NUM_BATCHES_OF_KILLED
    assert same(killed, unbroken)
