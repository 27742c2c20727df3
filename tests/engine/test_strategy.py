"""A strategy: the order of forward and backward passes is its own affair, and the gradient is the same."""

from __future__ import annotations

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.engine.strategy import Sequential, Strategy, run_in_order
from gradfold.engine.window import Context

F = nn.functional


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


class Events:
    """The passes of a window that only says which of them ran."""

    def __init__(self):
        self.context, self.events = Context(nn.Linear(1, 1)), []

    def forward(self, index):
        self.events.append(f"F{index}")
        return index

    def backward(self, index):
        self.events.append(f"B{index}")

    def __str__(self):
        return " ".join(self.events)


class ForwardsFirst(Strategy):
    """All forward passes, then the backward passes from the last to the first: what coupled batches need."""

    def run(self, window, indices, snapshot):
        for weighed in reversed([window.forward(index) for index in indices]):
            window.backward(weighed)

    def is_sequential(self, context):
        return False


@pytest.mark.parametrize(
    ("run", "events"),
    [
        (lambda window: Sequential(loss_fn).run(window, [0, 1], None), "F0 B0 F1 B1"),
        (lambda window: Sequential(loss_fn).run(window, [2, 0], None), "F2 B2 F0 B0"),
        (lambda window: Sequential(loss_fn).run(window, [], None), ""),
        (lambda window: run_in_order(window, [0, 1, 2]), "F0 B0 F1 B1 F2 B2"),
        (lambda window: ForwardsFirst(loss_fn).run(window, [0, 1, 2], None), "F0 F1 F2 B2 B1 B0"),
    ],
)
def test_the_order_of_the_passes(run, events):
    window = Events()
    run(window)
    assert str(window) == events


@pytest.mark.parametrize("fits", [3, 2, 1])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_another_order_gives_the_same_gradient(size, fits):
    """Also where micro-batches are halved on the way."""
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 1).double(), (torch.randn(5, 3).double(), torch.randn(5, 1).double())
    loss = loss_fn(model, batch).item()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))

    def limited(model, batch):
        if len(batch[0]) > fits:
            raise torch.OutOfMemoryError
        return loss_fn(model, batch)

    accumulator = gradfold.Accumulator(model, limited, micro_batch_size=size, self_check=False)
    accumulator._strategy = ForwardsFirst(limited)
    result = accumulator.backward(batch)
    assert relative_error(gradients(model), expected) < 1e-12
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    assert bool(result.recoveries) == (size > fits)


def test_all_forwards_first_in_a_window_of_an_accumulator():
    model, batch = nn.Linear(3, 1).double(), (torch.randn(5, 3).double(), torch.randn(5, 1).double())
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2)
    order = []

    class Noted(ForwardsFirst):
        def run(self, window, indices, snapshot):
            order.append(list(indices))
            super().run(window, indices, snapshot)

    accumulator._strategy = Noted(loss_fn)
    accumulator.backward(batch)
    assert order == [[0, 1, 2]]
    assert relative_error(gradients(model), expected) < 1e-12


def test_a_whole_batch_runs_as_in_plain_torch():
    """Whatever the strategy: one micro-batch depends on no other."""

    class Never(ForwardsFirst):
        def run(self, window, indices, snapshot):
            raise AssertionError("one micro-batch needs no strategy")

    model = nn.Linear(3, 1)
    accumulator = gradfold.Accumulator(model, lambda model, batch: model(batch).mean())
    accumulator._strategy = Never(accumulator.loss_fn)
    assert accumulator.backward(torch.ones(4, 3)).num_micro_batches == 1
    assert model.bias.grad.item() == 1


def test_a_strategy_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Strategy(loss_fn)
