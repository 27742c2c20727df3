"""A transaction: commits, rewinds, rolls back, goes back to a savepoint, or is given up."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_state, state
from torch import nn

from gradfold.state.buffers import BufferKeeper
from gradfold.state.snapshot import Snapshot


class Model(nn.Module):
    """A layer, and a buffer that moves when it runs."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.register_buffer("passes", torch.zeros(()))

    def run(self):
        """One micro-batch: numbers are drawn, a buffer moves, gradients grow."""
        self.passes.add_(1)
        self.linear(torch.rand(3, 2)).sum().backward()


@pytest.fixture
def model():
    model = Model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    return model


def opened(model, buffers=None):
    return Snapshot(model, list(model.modules()), list(model.parameters()), buffers or BufferKeeper())


class Failed(Exception):
    pass


def fail(*_):
    raise Failed


def held(model):
    return [parameter.grad for parameter in model.parameters()]


def test_it_commits_at_the_end_of_its_block(model):
    tensors, before, buffers = held(model), state(model), BufferKeeper()
    with opened(model, buffers) as transaction:
        assert held(model) == [None, None], "meanwhile the fields are empty"
        model.run()
        new = [gradient.clone() for gradient in held(model)]
        transaction.settle()
    assert all(ours is theirs for ours, theirs in zip(held(model), tensors, strict=True))
    assert all(torch.equal(total, 7.0 + one) for total, one in zip(tensors, new, strict=True))
    assert model.passes.item() == 1 and not torch.equal(torch.get_rng_state(), before["random"])
    assert not buffers.have_changed(), "nothing is kept any more"


@pytest.mark.parametrize("error", [Failed, KeyboardInterrupt])
def test_it_rolls_back_on_any_exception(model, error):
    tensors, before = held(model), state(model)
    with pytest.raises(error), opened(model):
        model.run()
        raise error
    assert_same_state(state(model), before)
    assert all(ours is theirs for ours, theirs in zip(held(model), tensors, strict=True))


@pytest.mark.parametrize("method", ["learn", "add_back"])
def test_it_rolls_back_where_the_close_fails(model, method, monkeypatch):
    before, tensors = state(model), held(model)
    with pytest.raises(Failed), opened(model) as transaction:
        model.run()
        owner = transaction._buffers if method == "learn" else transaction.gradients
        monkeypatch.setattr(type(owner), method, fail)
        transaction.settle()
    assert_same_state(state(model), before)
    assert all(ours is theirs for ours, theirs in zip(held(model), tensors, strict=True))


def test_the_random_state_is_restored_though_a_warning_about_buffers_is_an_error(model):
    buffers = BufferKeeper()
    with opened(model, buffers) as transaction:
        transaction.settle()  # nothing has changed, so that nothing is kept from now on
    before = state(model)
    with pytest.raises(RuntimeWarning, match=r"Model\.passes"), opened(model, buffers):
        model.run()
        raise Failed
    after = state(model)
    assert after["buffers"].pop("passes").item() == 1
    del before["buffers"]["passes"]
    assert_same_state(after, before)


def test_it_rolls_back_though_memory_does_not_suffice_to_compare_buffers(model, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    before = state(model)
    with pytest.raises(Failed), opened(model):
        model.run()
        monkeypatch.setattr("gradfold.state.buffers._changed", no_memory)
        raise Failed
    assert_same_state(state(model), before)


def test_a_rewind_begins_again_with_empty_gradients(model):
    with opened(model) as transaction:
        model.run()
        first = [gradient.clone() for gradient in held(model)]
        model.run()
        transaction.rewind()
        assert held(model) == [None, None] and model.passes.item() == 0
        model.run()
        assert all(torch.equal(*pair) for pair in zip(first, held(model), strict=True)), "the same random numbers"
    assert model.passes.item() == 1
    assert all(torch.equal(total, 7.0 + one) for total, one in zip(held(model), first, strict=True))


def test_a_window_can_be_rewound_and_rolled_back(model):
    before = state(model)
    with pytest.raises(Failed), opened(model) as transaction:
        for _ in range(3):
            model.run()
            transaction.rewind()
        model.run()
        raise Failed
    assert_same_state(state(model), before)


def test_a_rewind_goes_back_to_the_beginning_and_a_roll_back_to_the_opening(model):
    """In between the batch is cut, and collation may draw random numbers."""
    opening = torch.get_rng_state()
    with pytest.raises(Failed), opened(model) as transaction:
        torch.rand(5)
        transaction.begin()
        beginning = torch.get_rng_state()
        assert not transaction.has_drawn()
        model.run()
        assert transaction.has_drawn()
        transaction.rewind()
        assert torch.equal(torch.get_rng_state(), beginning) and not transaction.has_drawn()
        raise Failed
    assert torch.equal(torch.get_rng_state(), opening)


def test_given_up_it_leaves_no_gradient_and_the_buffers_as_they_were(model):
    with opened(model) as transaction:
        model.run()
        moved = torch.get_rng_state()
        transaction.give_up()
    assert held(model) == [None, None] and model.passes.item() == 0
    assert torch.equal(torch.get_rng_state(), moved)


def test_what_was_given_up_can_still_be_rolled_back(model):
    tensors, before = held(model), state(model)
    with pytest.raises(KeyboardInterrupt), opened(model) as transaction:
        model.run()
        transaction.give_up()
        raise KeyboardInterrupt
    assert_same_state(state(model), before)
    assert all(ours is theirs for ours, theirs in zip(held(model), tensors, strict=True))


def test_gradients_that_are_not_finite_are_flagged(model):
    with opened(model) as transaction:
        model.run()
        assert not any(flag.item() for flag in transaction.settle())
        model.linear.weight.grad[0, 1] = float("nan")
        assert any(flag.item() for flag in transaction.settle())


class TestSavepoint:
    def test_what_has_only_drawn_numbers_is_undone(self, model):
        with opened(model) as transaction:
            savepoint = transaction.savepoint()
            state_then = torch.get_rng_state()
            model.linear(torch.rand(3, 2)).sum()
            assert transaction.go_back_to(savepoint)
            assert torch.equal(torch.get_rng_state(), state_then)

    @pytest.mark.parametrize("which", ["weight", "bias"])
    @pytest.mark.parametrize("has_gradient", [False, True])
    def test_a_gradient_that_has_grown_is_a_trace(self, model, which, has_gradient):
        with opened(model) as transaction:
            if has_gradient:
                model.linear(torch.ones(3, 2)).sum().backward()
            savepoint = transaction.savepoint()
            assert not savepoint.is_touched()
            moved = torch.rand(1), torch.get_rng_state()
            getattr(model.linear, which).sum().backward()
            assert savepoint.is_touched()
            assert not transaction.go_back_to(savepoint)
            assert torch.equal(torch.get_rng_state(), moved[1]), "nothing is undone"

    def test_a_gradient_that_was_replaced_by_its_equal_is_a_trace(self, model):
        with opened(model) as transaction:
            model.linear(torch.ones(3, 2)).sum().backward()
            savepoint = transaction.savepoint()
            model.linear.weight.grad = model.linear.weight.grad.clone()
            assert savepoint.is_touched()

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_a_buffer_that_has_moved_in_this_window_is_a_trace(self, model, when):
        """Only its value at the opening is known."""
        with opened(model) as transaction:
            if when == "before":
                model.passes.add_(1)
            savepoint = transaction.savepoint()
            if when == "after":
                model.passes.add_(1)
            assert not transaction.go_back_to(savepoint)

    def test_a_buffer_that_never_moved_before_is_a_trace(self, model):
        buffers = BufferKeeper()
        with opened(model, buffers):
            pass  # from now on it is not kept
        with opened(model, buffers) as transaction:
            savepoint = transaction.savepoint()
            model.passes.add_(1)
            assert not transaction.go_back_to(savepoint)
