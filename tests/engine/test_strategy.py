"""A strategy: the order of forward and backward passes is its own affair, and the gradient is the same."""

from __future__ import annotations

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.engine.strategy import Sequential, Strategy, WrappedStrategy, run_in_order
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


class Wrapped(WrappedStrategy):
    def run(self, window, indices, snapshot):
        self.strategy.run(window, indices, snapshot)


@pytest.mark.parametrize(
    ("run", "events"),
    [
        (lambda window: Sequential(loss_fn).run(window, [0, 1], None), "F0 B0 F1 B1"),
        (lambda window: Sequential(loss_fn).run(window, [2, 0], None), "F2 B2 F0 B0"),
        (lambda window: Sequential(loss_fn).run(window, [], None), ""),
        (lambda window: run_in_order(window, [0, 1, 2]), "F0 B0 F1 B1 F2 B2"),
        (lambda window: ForwardsFirst(loss_fn).run(window, [0, 1, 2], None), "F0 F1 F2 B2 B1 B0"),
        (lambda window: Wrapped(ForwardsFirst(loss_fn)).run(window, [0, 1], None), "F0 F1 B1 B0"),
    ],
)
def test_the_order_of_the_passes(run, events):
    window = Events()
    run(window)
    assert str(window) == events


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("fits", [3, 2, 1])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_another_order_gives_the_same_gradient(size, fits, wrap):
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
    strategy = ForwardsFirst(limited)
    accumulator._strategy = Wrapped(strategy) if wrap else strategy
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


class TestWrapped:
    def test_it_answers_as_the_strategy_does(self):
        asked = []

        class Asked(ForwardsFirst):
            probes_loss, runs_zero_weight, has_own_gradients = False, True, False

            def is_sequential(self, context):
                asked.append(("is_sequential", context))
                return "sequential"

            def is_whole(self, window):
                asked.append(("is_whole", window))
                return "whole"

            def depends_on_split(self, context):
                asked.append(("depends_on_split", context))
                return "depends"

            def find_offender(self, window):
                asked.append(("find_offender", window))
                return 7

        context, window = Context(nn.Linear(1, 1)), Events()
        wrapped = Wrapped(Asked(loss_fn))
        assert wrapped.probe_loss is loss_fn
        assert (wrapped.probes_loss, wrapped.runs_zero_weight, wrapped.has_own_gradients) == (False, True, False)
        assert wrapped.is_sequential(context) == "sequential"
        assert wrapped.is_whole(window) == "whole"
        assert wrapped.depends_on_split(context) == "depends"
        assert wrapped.find_offender(window) == 7
        assert asked == [
            ("is_sequential", context),
            ("is_whole", window),
            ("depends_on_split", context),
            ("find_offender", window),
        ]

    def test_twice_around_a_strategy_is_the_same(self):
        window = Events()
        outer = Wrapped(Wrapped(Sequential(loss_fn)))
        outer.run(window, [0, 1], None)
        assert str(window) == "F0 B0 F1 B1" and outer.is_sequential(window.context)

    def test_it_is_abstract(self):
        with pytest.raises(TypeError, match="abstract"):
            WrappedStrategy(Sequential(loss_fn))
        with pytest.raises(TypeError, match="abstract"):
            Strategy(loss_fn)
