"""The note on an error of the user's function: which micro-batch ran, and which rows."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import gradfold
from gradfold.errors import LossError

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes")


class Failing:
    """A loss that fails on the row that holds this number, from this call on."""

    def __init__(self, row, error, first_call=0):
        self.row, self.error, self.first_call = row, error, first_call
        self.num_calls = 0

    def __call__(self, model, batch):
        self.num_calls += 1
        if (batch == self.row).any() and self.num_calls >= self.first_call:
            raise self.error
        return model(batch).square().mean()


def numbered(num_rows):
    return torch.arange(num_rows).double()[:, None]


def notes_of(loss_fn, batch, **options):
    accumulator = gradfold.Accumulator(nn.Linear(1, 1).double(), loss_fn, **options)
    with pytest.raises(type(loss_fn.error)) as caught:
        accumulator.backward(batch)
    return getattr(caught.value, "__notes__", [])


@pytest.mark.parametrize("checks", [False, True])
@pytest.mark.parametrize(
    "row, note", [(7, "in micro-batch 3 of 5 (rows 6 to 7)"), (8, "in micro-batch 4 of 5 (row 8)")]
)
def test_it_names_the_micro_batch_and_its_rows(row, note, checks):
    loss_fn = Failing(row, RuntimeError("shapes"))
    assert notes_of(loss_fn, numbered(9), micro_batch_size=2, self_check=checks) == [note]


def test_in_a_window_of_micro_batches():
    (window,) = gradfold.windows(numbered(7).split(3), 3)
    assert notes_of(Failing(4, KeyError("labels")), window) == ["in micro-batch 1 of 3 (rows 3 to 5)"]


def test_where_the_self_check_meets_it():
    loss_fn = Failing(0, ValueError("labels"))
    assert notes_of(loss_fn, numbered(9), micro_batch_size=4) == ["in micro-batch 0 of 3 (rows 0 to 3)"]


def test_once_however_often_the_same_error_is_raised():
    loss_fn = Failing(4, ValueError("labels"))
    for _ in range(2):
        notes = notes_of(loss_fn, numbered(6), micro_batch_size=2, self_check=False)
    assert notes == ["in micro-batch 2 of 3 (rows 4 to 5)"]


def test_after_out_of_memory_it_names_the_smaller_micro_batch():
    class Small(Failing):
        def __call__(self, model, batch):
            if len(batch) > 2:
                raise torch.OutOfMemoryError("no memory")
            return super().__call__(model, batch)

    loss_fn = Small(5, ValueError("labels"))
    assert notes_of(loss_fn, numbered(8), self_check=False) == ["in micro-batch 2 of 4 (rows 4 to 5)"]


def test_gradfolds_own_errors_say_it_themselves():
    assert notes_of(Failing(5, LossError("no loss")), numbered(6), micro_batch_size=2, self_check=False) == []
