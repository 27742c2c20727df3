"""A window inside loss_fn of another: refused over the same parameters, as in plain torch over others."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.state import snapshot as snapshot_module


def squares(model, x):
    return model(x).square().mean()


def linear():
    return nn.Linear(3, 2).double()


@pytest.fixture
def x():
    return torch.randn(7, 3, dtype=torch.float64)


def accumulator(model, loss_fn=squares, **options):
    return gradfold.Accumulator(model, loss_fn, micro_batch_size=3, **options)


@pytest.mark.parametrize("self_check", [False, True])
@pytest.mark.parametrize("size", [3, None])
def test_over_the_same_parameters_it_is_refused_and_nothing_is_lost(x, self_check, size):
    """The gradient was 150 % off."""
    model = linear()
    model.weight.grad = torch.ones_like(model.weight)
    inner = accumulator(model)

    def loss_fn(model, x):
        inner.backward(x)
        return squares(model, x)

    outer = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, self_check=self_check)
    with pytest.raises(gradfold.WindowError, match=r"^weight and bias: a window inside .* one after another"):
        outer.backward(x)
    assert model.weight.grad.eq(1).all() and model.bias.grad is None
    model.zero_grad()
    inner.backward(x)
    assert relative_error(gradients(model), full_batch_gradient(model, lambda model: squares(model, x))) < 1e-12


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(linear(), nn.BatchNorm1d(2).double()), nn.Linear(2, 1).double()

    def forward(self, x):
        return self.head(self.body(x))


def test_so_is_one_over_a_part_of_the_model_in_a_thread_of_exact_batch_norm(x):
    model = Both()

    def loss_fn(model, x):
        hidden = model.body(x)
        accumulator(model.head, self_check=False).backward(hidden.detach())
        return model.head(hidden).square().mean()

    with pytest.raises(gradfold.WindowError, match=r"^head.weight and head.bias: "):
        accumulator(model, loss_fn, batch_norm="exact", self_check=False).backward(x)
    assert not gradients(model)


def test_so_is_a_loop_over_a_window(x):
    model = linear()

    def loss_fn(model, x):
        for window in gradfold.windows(x.split(1), 2, model=model):
            for part in window:
                window.backward(squares(model, part))
        return squares(model, x)

    with pytest.raises(gradfold.WindowError, match="one after another"):
        accumulator(model, loss_fn, self_check=False).backward(x)
    assert not gradients(model)


def test_and_a_window_inside_the_loop_over_one(x):
    model = linear()
    inner = accumulator(model)
    with pytest.raises(gradfold.WindowError, match="another loss"):
        for window in gradfold.windows(x.split(2), 4, model=model):
            for part in window:
                window.backward(squares(model, part))
                inner.backward(x)


@pytest.mark.parametrize("batch_norm", [None, "exact"])
@pytest.mark.parametrize("has_gradients", [False, True])
def test_over_another_model_it_is_fine(x, batch_norm, has_gradients):
    """A critic that is trained beside; the self-check's own runs leave nothing in it."""
    model, critic = (Both() if batch_norm else linear()), linear()
    if has_gradients:
        critic.weight.grad = torch.ones_like(critic.weight)
    inner = accumulator(critic)

    def loss_fn(model, x):
        inner.backward(x)
        return squares(model, x)

    expected = full_batch_gradient(model, lambda model: squares(model, x))
    beside = copy.deepcopy(critic)
    beside.zero_grad()
    for part in x.split(3):
        squares(beside, part).backward()
    if has_gradients:
        beside.weight.grad += 1
    accumulator(model, loss_fn, batch_norm=batch_norm).backward(x)
    assert relative_error(gradients(model), expected) < 1e-12
    assert relative_error(gradients(critic), gradients(beside)) < 1e-12


def test_over_shared_parameters_that_are_frozen_it_is_fine(x):
    body, head, model = linear(), nn.Linear(2, 2).double(), linear()
    body.requires_grad_(False)
    inner = accumulator(nn.Sequential(body, head))
    both = nn.ModuleList([body, model])

    def loss_fn(both, x):
        inner.backward(x)
        return (both[0](x) - both[1](x)).square().mean()

    expected = full_batch_gradient(both, lambda both: (both[0](x) - both[1](x)).square().mean())
    accumulator(both, loss_fn).backward(x)
    assert relative_error(gradients(both), expected) < 1e-12


def test_it_is_fine_again_after_any_error(x):
    model = linear()

    def fails(model, x):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            accumulator(model, fails).backward(x)
    accumulator(model).backward(x)
    assert relative_error(gradients(model), full_batch_gradient(model, lambda model: squares(model, x))) < 1e-12


def test_a_window_that_ended_unnoticed_stands_in_nobodys_way(x, monkeypatch):
    """As by one interrupt in the roll-back that another has caused."""
    model = linear()

    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(snapshot_module.Snapshot, "__exit__", interrupted)
    monkeypatch.setattr(snapshot_module.Snapshot, "roll_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        accumulator(model).backward(x)
    monkeypatch.undo()
    model.zero_grad()
    accumulator(model).backward(x)
    assert relative_error(gradients(model), full_batch_gradient(model, lambda model: squares(model, x))) < 1e-12
    snapshot_module._innermost.set(None)  # what ended unnoticed


def test_the_sum_of_both_losses_is_what_the_message_says(exact, x):
    exact(linear(), lambda model, x: squares(model, x) + F.relu(model(x)).mean(), x, micro_batch_size=3)
