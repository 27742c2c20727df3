"""Losses that change after the first window: looked at before the gradient is handed over, and now and then again."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.errors import NotDecomposableError


def batch_of(num_rows=16):
    return torch.randn(num_rows, 5).double(), torch.randint(0, 3, (num_rows,))


def plain(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def coupled(model, batch):
    outputs = model(batch[0])
    return (outputs - outputs.mean(0)).sin().square().mean() + outputs.mean(0).square().sum()


class Schedule:
    """Adds to the loss from some window on."""

    def __init__(self, late):
        self.late, self.is_on = late, False

    def __call__(self, model, batch):
        return self.late(model, batch) if self.is_on else self.early(model, batch)

    def early(self, model, batch):
        return plain(model, batch)


class Named(Schedule):
    def early(self, model, batch):
        return {"classes": plain(model, batch)}


def bare_sum(model, batch):
    return plain(model, batch) + coupled(model, batch)


def named_sum(model, batch):
    return {"classes": plain(model, batch), "pairs": coupled(model, batch)}


def other_reduction(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none").sum()


SCHEDULES = {
    "a term that is added": lambda: Schedule(bare_sum),
    "a term with a name": lambda: Named(named_sum),
    "another reduction": lambda: Schedule(other_reduction),
    "another loss": lambda: Schedule(lambda model, batch: coupled(model, batch).exp()),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("num_before", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 4])
def test_a_loss_that_changes_is_refused_before_its_gradient_is_handed_over(make, num_before, size):
    model, loss_fn = nn.Linear(5, 3).double(), make()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=size)
    for _ in range(num_before):
        accumulator.backward(batch_of())
    before = gradients(model)
    loss_fn.is_on = True
    for _ in range(2):  # it stays refused
        with pytest.raises(NotDecomposableError):
            accumulator.backward(batch_of())
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())
    loss_fn.is_on = False
    accumulator.backward(batch_of())


def test_a_term_that_only_a_later_micro_batch_has():
    def has_pairs(batch):
        return float((batch[0][:, 0] > 0).sum())

    def loss_fn(model, batch):
        terms = {"classes": plain(model, batch)}
        return terms | ({"pairs": coupled(model, batch)} if has_pairs(batch) else {})

    model, (inputs, labels) = nn.Linear(5, 3).double(), batch_of()
    inputs[:, 0] = -1
    weight = {"classes": "samples", "pairs": has_pairs}
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, weight=weight)
    with pytest.raises(gradfold.WeightError):
        accumulator.backward((inputs, labels))
    inputs[8:12, 0] = 1
    with pytest.raises(NotDecomposableError, match="'pairs'"):
        accumulator.backward((inputs, labels))


def test_a_loss_that_changes_to_a_right_one_is_looked_at_once():
    calls = []

    def loss_fn(model, batch):
        calls.append(len(batch[0]))
        loss = plain(model, batch)
        return loss + 1e-3 * model.weight.square().sum() if is_on else loss

    model, batch, is_on = nn.Linear(5, 3).double(), batch_of(), False
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4)
    accumulator.backward(batch)
    is_on = True
    model.zero_grad()
    accumulator.backward(batch)
    expected = full_batch_gradient(model, lambda model: plain(model, batch) + 1e-3 * model.weight.square().sum())
    assert relative_error(gradients(model), expected) <= 1e-12
    for again in (False, True, False):
        calls.clear()
        is_on = again
        accumulator.backward(batch)
        assert calls == [4, 4, 4, 4], "both are known"


def test_what_changes_inside_of_one_graph_is_found_by_a_rare_look_again():
    """The graph is the same: only the numbers in a mask couple the rows, from window 10 on."""
    strength = torch.zeros(()).double()

    def loss_fn(model, batch):
        outputs = model(batch[0])
        return F.cross_entropy(outputs - strength * outputs.mean(0), batch[1])

    model = nn.Linear(5, 3).double()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4)
    for number in range(1, 64):
        strength.fill_(float(number >= 10))
        accumulator.backward(batch_of())
    with pytest.raises(NotDecomposableError, match="depend on each other"):
        accumulator.backward(batch_of())


SAME = torch.ones(8, 5).double(), torch.zeros(8, dtype=torch.int64)


def test_what_stays_undecided_is_said_once_with_what_was_seen():
    """All rows are the same, so any weights fit."""
    model = nn.Linear(5, 3).double()
    accumulator = gradfold.Accumulator(model, plain, micro_batch_size=4)
    said = []
    for number in range(1, 70):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accumulator.backward(SAME)
        said += [(number, str(one.message)) for one in caught]
    assert [number for number, _ in said] == [16]
    assert "same gradient" in said[0][1] and "verify" in said[0][1]


def test_a_loss_without_any_slope_is_said_once():
    model = nn.Linear(5, 3).double()
    accumulator = gradfold.Accumulator(model, lambda model, batch: plain(model, batch).clamp(max=0), micro_batch_size=4)
    for _ in range(15):
        accumulator.backward(batch_of())
    with pytest.warns(RuntimeWarning, match="no gradient"):
        accumulator.backward(batch_of())
    accumulator.backward(batch_of())


def test_rows_that_tell_settle_it_before_anything_is_said():
    model = nn.Linear(5, 3).double()
    accumulator = gradfold.Accumulator(model, plain, micro_batch_size=4)
    for _ in range(15):
        accumulator.backward(SAME)
    for _ in range(5):
        accumulator.backward(batch_of())  # a warning would be an error
