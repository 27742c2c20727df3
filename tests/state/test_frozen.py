"""Frozen parameters that the user's loss moves: a teacher that follows its student by a moving average."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradfold
from gradfold.state import buffers
from gradfold.state.buffers import FrozenKeeper


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = nn.Linear(3, 2).double()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        with torch.no_grad():
            self.teacher.weight.add_(0.1)


def follow(model):
    with torch.no_grad():
        for slow, fast in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            slow.lerp_(fast, 0.1)


def loss_fn(model, batch):
    loss = (model.student(batch) - model.teacher(batch).detach()).square().mean()
    follow(model)
    return loss


class Faulty:
    """Fails in one call."""

    failing: int | None = None
    num_calls = 0

    def __call__(self, model, batch):
        loss = loss_fn(model, batch)
        Faulty.num_calls += 1
        if Faulty.num_calls == Faulty.failing:
            raise self.error
        return loss

    def __init__(self, error):
        self.error = error
        Faulty.num_calls, Faulty.failing = 0, None


def moved_by_hand(model, times):
    model = copy.deepcopy(model)
    for _ in range(times):
        follow(model)
    return model.teacher.weight


def test_the_self_check_does_not_move_them():
    def loss_fn(model, batch):
        loss = model.student(batch).square().mean()
        follow(model)  # into the loss it does not go: rows of later micro-batches would see another teacher
        return loss

    model, batch = Pair(), torch.randn(20, 3).double()
    expected, version = moved_by_hand(model, 4), model.teacher.weight._version
    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=5).backward(batch)
    assert result.num_micro_batches == 4
    assert model.teacher.weight._version - version == 4  # by the window: it must not take the check for a movement
    torch.testing.assert_close(model.teacher.weight, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("failing", [1, 3, 4])
def test_once_they_were_seen_to_move_a_failed_window_puts_them_back(failing):
    model, batch, loss = Pair(), torch.randn(20, 3).double(), Faulty(ValueError("a fault"))
    accumulator = gradfold.Accumulator(model, loss, micro_batch_size=5, self_check=False)
    accumulator.backward(batch)
    before = model.teacher.weight.clone()
    Faulty.num_calls, Faulty.failing = 0, failing
    with pytest.raises(ValueError, match="a fault"):
        accumulator.backward(batch)
    assert torch.equal(model.teacher.weight, before)


def test_where_nothing_was_known_a_failed_window_says_that_they_keep_their_values():
    model, batch, loss = Pair(), torch.randn(20, 3).double(), Faulty(ValueError("a fault"))
    accumulator = gradfold.Accumulator(model, loss, micro_batch_size=5, self_check=False)
    Faulty.failing = 2
    with pytest.warns(RuntimeWarning, match=r"moved frozen parameters.*\(2, 3\)"), pytest.raises(ValueError):
        accumulator.backward(batch)


@pytest.mark.parametrize("num_rows", [16, 8])  # with 8, only micro-batches of 4 rows are known to fit
def test_a_window_that_begins_again_begins_with_their_values(num_rows):
    model, batch, loss = Pair(), torch.randn(16, 3).double(), Faulty(MemoryError())
    accumulator = gradfold.Accumulator(model, loss, micro_batch_size=8, self_check=False)
    accumulator.backward(batch[: num_rows // 2])
    expected = moved_by_hand(model, 4)
    Faulty.num_calls, Faulty.failing = 0, 2
    assert accumulator.backward(batch).num_micro_batches == 4
    torch.testing.assert_close(model.teacher.weight, expected, rtol=1e-12, atol=0)


def test_what_is_trained_by_now_is_not_put_back():
    model, batch, loss = Pair(), torch.randn(16, 3).double(), Faulty(MemoryError())
    accumulator = gradfold.Accumulator(model, loss, micro_batch_size=8, self_check=False)
    accumulator.backward(batch)
    accumulator.backward(batch)
    model.teacher.requires_grad_(True)
    expected = moved_by_hand(model, 5)  # nothing is kept of what is not frozen: the first call has moved it, too
    Faulty.num_calls, Faulty.failing = 0, 1
    accumulator.backward(batch)
    torch.testing.assert_close(model.teacher.weight, expected, rtol=1e-12, atol=0)


def test_a_frozen_backbone_is_not_copied_for_a_check(monkeypatch):
    """What is frozen may be nearly all of a model, and twice of it may not fit."""
    monkeypatch.setattr(buffers, "_MAX_FROZEN_BYTES", 100)
    backbone, head = nn.Linear(5, 5), nn.Linear(5, 2)
    backbone.requires_grad_(False)  # 120 bytes, of which no parameter alone is more than 100; the head has 48
    for parameters, num_copies in (([*backbone.parameters(), *head.parameters()], 0), (list(Pair().parameters()), 2)):
        keeper = FrozenKeeper(copies_all=True)
        keeper.open(parameters)
        assert len(keeper._copies) == num_copies


def test_only_what_moves_is_copied():
    model = Pair()
    keeper = FrozenKeeper()
    keeper.open(list(model.parameters()))
    assert not keeper.moved() and not keeper._copies
    follow(model)
    assert [id(one) for one, _ in keeper.moved()] == [id(one) for one in model.teacher.parameters()]
    keeper.learn()
    model.student.requires_grad_(False)
    keeper.open(list(model.parameters()))
    assert set(keeper._copies) == {id(one) for one in model.teacher.parameters()}
