"""A recovery: what a window says of the faults that it survived."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import gradfold
from gradfold import Recovery


@pytest.mark.parametrize(
    ("recovery", "text"),
    [
        (
            Recovery("out_of_memory", "halved", range(8, 16), 4, replayed=True),
            "out of memory at rows 8 to 15: continued with 4 rows at once",
        ),
        (
            Recovery("out_of_memory", "halved", range(2), 1, replayed=False, changes_randomness=True),
            "out of memory at rows 0 to 1: continued with 1 row at once "
            "(random numbers differ from those of a run without the fault)",
        ),
        (
            Recovery("out_of_memory", "halved", range(4), 2, True, True, True),
            "out of memory at rows 0 to 3: continued with 2 rows at once "
            "(random numbers and BatchNorm's statistics differ from those of a run without the fault)",
        ),
        (
            Recovery("non_finite", "skipped_micro_batch", range(4, 8), 0, replayed=True),
            "the gradient of rows 4 to 7 was not finite: left out",
        ),
        (
            Recovery("non_finite", "skipped_update", range(16), 0, replayed=False),
            "the gradient of rows 0 to 15 was not finite: no update",
        ),
    ],
    ids=lambda value: value.action if isinstance(value, Recovery) else "",
)
def test_it_reads_as_a_sentence(recovery, text):
    assert str(recovery) == text


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recovery("out_of_memory", "halved", range(2), 1, replayed=False).replayed = True


class Memory:
    def __init__(self, rows):
        self.rows = rows

    def __call__(self, model, batch):
        if len(batch) > self.rows:
            raise torch.OutOfMemoryError
        return model(batch).square().mean()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_window_says_what_a_smaller_size_has_changed(dropout, batch_norm):
    layers = [nn.BatchNorm1d(2)] if batch_norm else []
    layers += [nn.Dropout(dropout)] if dropout else []
    model = nn.Sequential(nn.Linear(2, 2), *layers)
    accumulator = gradfold.Accumulator(model, Memory(4), batch_norm="per_micro_batch", self_check=False)
    (recovery,) = accumulator.backward(torch.randn(8, 2)).recoveries
    assert (recovery.changes_randomness, recovery.changes_batch_statistics) == (dropout > 0, batch_norm)
    assert (recovery.cause, recovery.action) == ("out_of_memory", "halved")
    assert (recovery.rows, recovery.micro_batch_size) == (range(8), 4)


def test_a_window_without_a_fault_says_nothing():
    accumulator = gradfold.Accumulator(nn.Linear(2, 2), Memory(4), micro_batch_size=4)
    assert accumulator.backward(torch.randn(8, 2)).recoveries == ()


def test_random_numbers_that_only_collation_draws_are_not_said_to_differ():
    """The rows stay as they were collated."""

    def collate(samples):
        return torch.stack(samples) + torch.rand(1)

    accumulator = gradfold.Accumulator(nn.Linear(2, 2), Memory(4), collate=collate, self_check=False)
    (recovery,) = accumulator.backward(list(torch.randn(8, 2))).recoveries
    assert not recovery.changes_randomness
