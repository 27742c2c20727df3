"""The fitting size: learned from out-of-memory errors, remembered, tried again after a quiet period, and saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradfold
from gradfold.batch import split
from gradfold.batch.split import FittingSize, MicroBatcher

PATIENCE = split._PATIENCE


def wait(size, windows, asked=None):
    """So many windows as large as they may be."""
    for _ in range(windows):
        size.record_success(size.limit(asked) or 64, asked)


def test_nothing_is_known_at_first():
    size = FittingSize()
    assert (size.limit(None), size.limit(8), size.proven) == (None, 8, 0)
    wait(size, 3 * PATIENCE, 8)
    assert (size.limit(None), size.limit(8), size.proven) == (None, 8, 8)


def test_the_smaller_of_what_was_asked_and_what_fits_counts():
    size = FittingSize()
    size.shrink(16)
    assert (size.limit(None), size.limit(8), size.limit(16), size.limit(64)) == (16, 8, 16, 16)


def test_it_never_grows_by_shrinking():
    size = FittingSize()
    size.shrink(4)
    size.shrink(16)  # of a batch with longer rows
    assert size.limit(None) == 4


def test_twice_as_much_is_tried_after_a_quiet_period_and_not_before():
    size = FittingSize()
    size.shrink(8)
    wait(size, PATIENCE - 1)
    assert size.limit(None) == 8
    wait(size, 1)
    assert size.limit(None) == 16


def test_a_fault_in_the_quiet_period_begins_a_new_one():
    size = FittingSize()
    size.shrink(8)
    wait(size, PATIENCE - 1)
    size.shrink(8)
    wait(size, PATIENCE - 1)
    assert size.limit(None) == 8
    wait(size, 1)
    assert size.limit(None) == 16


def test_a_larger_size_that_fits_is_kept_and_doubled_again():
    size = FittingSize()
    size.shrink(8)
    wait(size, 2 * PATIENCE)
    assert size.limit(None) == 32
    size.shrink(16)
    wait(size, PATIENCE * 2)
    assert size.limit(None) == 32, "a trial that failed at once makes for twice the patience"


def test_each_trial_that_fails_makes_the_next_period_twice_as_long():
    size = FittingSize()
    size.shrink(8)
    for factor in (1, 2, 4, 8):
        wait(size, factor * PATIENCE - 1)
        assert size.limit(None) == 8
        wait(size, 1)
        assert size.limit(None) == 16
        size.shrink(8)


def test_only_the_first_fault_of_a_trial_counts_as_its_failure():
    size = FittingSize()
    size.shrink(8)
    wait(size, PATIENCE)
    size.shrink(8)
    size.shrink(4)
    wait(size, 2 * PATIENCE - 1)
    assert size.limit(None) == 4
    wait(size, 1)
    assert size.limit(None) == 8


def test_a_fault_long_after_a_trial_that_went_well_is_a_new_one():
    size = FittingSize()
    size.shrink(8)
    wait(size, PATIENCE + 1)  # 16 has gone through once
    size.shrink(8)
    wait(size, PATIENCE)
    assert size.limit(None) == 16


def test_a_window_too_small_to_try_the_size_tells_nothing():
    size = FittingSize()
    size.shrink(8)
    wait(size, PATIENCE)
    size.record_success(8, None)  # of the 16 that are tried
    size.shrink(8)
    wait(size, PATIENCE)
    assert size.limit(None) == 8, "the trial has failed"
    wait(size, PATIENCE)
    assert size.limit(None) == 16


def test_it_grows_to_what_was_asked_and_no_further():
    size = FittingSize()
    size.shrink(3)
    wait(size, 5 * PATIENCE, 10)
    assert size.limit(10) == 10
    assert size.rows == 10


@pytest.mark.parametrize("windows", [0, 1, PATIENCE - 1, PATIENCE, PATIENCE + 1])
def test_a_restored_one_goes_on_as_the_one_saved(windows):
    saved, loaded = MicroBatcher(None), MicroBatcher(None)
    size = saved.fitting
    size.shrink(8)
    wait(size, PATIENCE)
    size.shrink(8)
    wait(size, windows)
    state = saved.state_dict()
    loaded.load_state_dict(state, with_size=False)
    restored = loaded.fitting
    assert restored == size and state["fitting_size"] is not vars(size)
    for one in (size, restored):
        wait(one, 2 * PATIENCE - windows)
    assert restored.limit(None) == size.limit(None) == 16


class Memory:
    """A loss function for which so many rows fit."""

    def __init__(self, rows):
        self.rows = rows
        self.sizes: list[int] = []

    def __call__(self, model, batch):
        if len(batch) > self.rows:
            raise torch.OutOfMemoryError("too many rows")
        self.sizes.append(len(batch))
        return nn.functional.dropout(model(batch)).square().mean()


def make(rows, **options):
    torch.manual_seed(3)
    model = nn.Linear(2, 1)
    loss_fn = Memory(rows)
    return model, loss_fn, gradfold.Accumulator(model, loss_fn, **options)


def test_an_accumulator_remembers_what_fits():
    _, loss_fn, accumulator = make(4, self_check=False)
    assert accumulator.backward(torch.randn(12, 2)).recoveries
    loss_fn.sizes.clear()
    assert not accumulator.backward(torch.randn(12, 2)).recoveries
    assert loss_fn.sizes == [3, 3, 3, 3]
    assert accumulator.micro_batch_size is None, "what the user has asked for stays"


def test_an_accumulator_tries_more_after_a_quiet_period(monkeypatch):
    monkeypatch.setattr(split, "_PATIENCE", 3)
    _, loss_fn, accumulator = make(4, micro_batch_size=8, self_check=False)
    recovered = []
    for _ in range(24):
        recovered.append(len(accumulator.backward(torch.randn(8, 2)).recoveries))
    # 3 quiet windows, then 6, then 12
    assert recovered == [1, 0, 0, 0, 1, *[0] * 6, 1, *[0] * 12]
    loss_fn.rows = 8
    loss_fn.sizes.clear()
    accumulator.backward(torch.randn(8, 2))
    assert loss_fn.sizes == [8], "it fits by now"


def test_a_resumed_run_cuts_its_batches_as_the_one_saved_would_have():
    batches = torch.randn(6, 12, 2).unbind()
    model, loss_fn, accumulator = make(5, micro_batch_size=12)
    for batch in batches[:3]:
        accumulator.backward(batch)
    saved = accumulator.state_dict(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    model.zero_grad()
    loss_fn.sizes.clear()
    for batch in batches[3:]:
        accumulator.backward(batch)
    other, other_loss, resumed = make(5, micro_batch_size=12)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    for batch in batches[3:]:
        assert not resumed.backward(batch).recoveries
    assert other_loss.sizes == loss_fn.sizes == [3] * 12
    assert torch.equal(other.weight.grad, model.weight.grad) and torch.equal(other.bias.grad, model.bias.grad)
