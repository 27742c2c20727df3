"""Tensors outside the model that a window back-propagates to: whatever runs again, their gradient counts a row once."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import Tensor, nn

import gradfold
from gradfold.engine import outside

F = nn.functional


class Failing(torch.autograd.Function):
    """The identity, whose backward pass runs out of memory where it is told to."""

    @staticmethod
    def forward(context, values, fails):
        context.fails = fails
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        if context.fails():
            raise torch.OutOfMemoryError("no memory")
        return gradient, None


class Training:
    """A model, something outside of it that is trained too, and a batch; `fault` is the backward pass that fails."""

    def __init__(self, kind):
        torch.manual_seed(3)
        self.model = nn.Linear(5, 4).double()
        self.head = nn.Linear(4, 3).double()
        self.scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        self.names = nn.Embedding(4, 4, sparse=True).double()
        self.inputs = torch.randn(11, 5, dtype=torch.float64)
        self.labels = torch.randint(0, 3, (11,))
        self.kind, self.fault, self.passes = kind, None, itertools.count()
        if kind == "inputs":
            self.inputs.requires_grad_()

    def leaves(self):
        found = {
            "criterion": list(self.head.parameters()),
            "temperature": [self.scale],
            "sparse": [self.names.weight],
            "inputs": [self.inputs],
            "nothing": [],
        }[self.kind]
        return [*self.model.parameters(), *found]

    def fails(self):
        return next(self.passes) == self.fault

    def loss_fn(self, model, batch):
        inputs, labels = batch
        hidden = Failing.apply(model(inputs), self.fails)
        if self.kind == "criterion":
            hidden = self.head(hidden)
        elif self.kind == "temperature":
            hidden = hidden * self.scale
        elif self.kind == "sparse":
            hidden = hidden + self.names(labels)
        return F.cross_entropy(hidden, labels)

    def gradients(self):
        assert all(leaf.grad is not None for leaf in self.leaves())
        return torch.cat([leaf.grad.to_dense().flatten() for leaf in self.leaves()])

    def reference(self, rows=slice(None), times=1):
        """What plain torch leaves there after the whole batch, `times` times."""
        other = copy.copy(self)
        other.fault = None
        model = copy.deepcopy(self.model)
        leaves = [*model.parameters(), *self.leaves()[2:]]
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        for _ in range(times):
            other.loss_fn(model, (self.inputs[rows], self.labels[rows])).backward()
        expected = torch.cat([leaf.grad.to_dense().flatten() for leaf in leaves])
        for leaf, before in zip(leaves, found, strict=True):
            leaf.grad = before
        return expected

    def run(self, accumulator, fault=None):
        """One window, whose backward pass number `fault`, not counting the guard's, fails."""
        self.fault, self.passes = fault, itertools.count()
        return accumulator.backward((self.inputs, self.labels))

    def zero(self):
        for leaf in self.leaves():
            leaf.grad = None


def assert_equal(found, expected):
    assert float((found - expected).norm() / expected.norm()) <= 1e-12


KINDS = ["criterion", "temperature", "sparse", "inputs", "nothing"]


@pytest.mark.parametrize("fault", [0, 1, 3])
@pytest.mark.parametrize("before", [0, 1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_begins_again_counts_every_row_once(kind, before, fault):
    """In the first window, and in later ones, which look no longer; added to a gradient that was found."""
    training = Training(kind)
    accumulator = gradfold.Accumulator(training.model, training.loss_fn, micro_batch_size=3, self_check=False)
    for _ in range(before):
        training.zero()
        training.run(accumulator)
    found = [leaf.grad for leaf in training.leaves()]
    assert training.run(accumulator, fault).recoveries
    assert_equal(training.gradients(), training.reference(times=2 if before else 1))
    assert not before or all(leaf.grad is one for leaf, one in zip(training.leaves(), found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_guard_is_no_obstacle(kind):
    training = Training(kind)
    for fault in range(8):  # of the guard's runs, too
        training.zero()
        training.run(gradfold.Accumulator(training.model, training.loss_fn, micro_batch_size=3), fault)
        assert_equal(training.gradients(), training.reference())


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_that_is_left_out_leaves_nothing_behind(kind, before):
    training = Training(kind)
    options = {"on_non_finite": "skip_micro_batch", "self_check": False}
    accumulator = gradfold.Accumulator(training.model, training.loss_fn, micro_batch_size=4, **options)
    for _ in range(before):
        training.zero()
        training.run(accumulator)
    training.zero()
    with torch.no_grad():
        training.inputs[5] = float("nan")
    result = training.run(accumulator)
    assert [one.action for one in result.recoveries] == ["skipped_micro_batch"]
    found = training.gradients()
    if kind == "inputs":
        assert not found[-55:].view(11, 5)[4:8].any()
    rest = [*range(4), *range(8, 11)]
    assert_equal(found, training.reference(rest))


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_that_is_skipped_leaves_no_gradient(kind):
    training = Training(kind)
    accumulator = gradfold.Accumulator(
        training.model, training.loss_fn, micro_batch_size=4, on_non_finite="skip_update", self_check=False
    )
    training.run(accumulator)
    with torch.no_grad():
        training.inputs[5] = float("nan")
    assert training.run(accumulator).is_skipped
    assert all(leaf.grad is None for leaf in training.leaves())


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_window_that_fails_puts_them_back(kind, before):
    training = Training(kind)
    calls, broken = itertools.count(), [False]

    def loss_fn(model, batch):
        if broken[0] and next(calls) == 2:
            raise KeyError("mine")
        return training.loss_fn(model, batch)

    accumulator = gradfold.Accumulator(training.model, loss_fn, micro_batch_size=3, self_check=False)
    for _ in range(before):
        training.run(accumulator)
    found = [(leaf.grad, None if leaf.grad is None else leaf.grad.to_dense().clone()) for leaf in training.leaves()]
    broken[0] = True
    with pytest.raises(KeyError):
        training.run(accumulator)
    for leaf, (gradient, values) in zip(training.leaves(), found, strict=True):
        assert leaf.grad is gradient
        assert gradient is None or torch.equal(gradient.to_dense(), values)


@pytest.mark.parametrize("fault", range(8))
def test_a_two_phase_loss_may_have_weights_of_its_own_outside(fault):
    """In the loss and in the statistic; any backward pass may fail, the one of the loss aside."""
    torch.manual_seed(0)
    model, head = nn.Linear(5, 4).double(), nn.Linear(4, 4).double()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inputs, passes = torch.randn(10, 5, dtype=torch.float64), itertools.count()
    leaves = [*model.parameters(), *head.parameters(), scale]

    def statistic(model, batch):
        return F.normalize(head(Failing.apply(model(batch), lambda: next(passes) == fault)), dim=1)

    def loss(model, statistics):
        return F.cross_entropy(statistics @ statistics.T * scale, torch.arange(len(statistics)).roll(1))

    gradfold.Accumulator(model, gradfold.TwoPhaseLoss(statistic, loss), micro_batch_size=3).backward(inputs)
    found = torch.cat([leaf.grad.flatten() for leaf in leaves])
    for leaf in leaves:
        leaf.grad = None
    passes = itertools.count(100)
    loss(model, statistic(model, inputs)).backward()
    assert_equal(found, torch.cat([leaf.grad.flatten() for leaf in leaves]))


@pytest.mark.parametrize("fault", range(3))
def test_exact_batch_norm_with_a_criterion(fault):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    head, passes = nn.Linear(4, 3).double(), itertools.count()
    inputs, labels = torch.randn(10, 5, dtype=torch.float64), torch.randint(0, 3, (10,))
    leaves = [*model.parameters(), *head.parameters()]

    def loss_fn(model, batch):
        return F.cross_entropy(head(Failing.apply(model(batch[0]), lambda: next(passes) == fault)), batch[1])

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=3, batch_norm="exact", self_check=False)
    assert accumulator.backward((inputs, labels)).recoveries
    found = torch.cat([leaf.grad.flatten() for leaf in leaves])
    for leaf in leaves:
        leaf.grad = None
    loss_fn(model, (inputs, labels)).backward()
    assert float((found - torch.cat([leaf.grad.flatten() for leaf in leaves])).norm()) <= 1e-12


class TestWhatAppearsLate:
    """A tensor that no earlier window reached: what it had in it before this one is not known any more."""

    def make(self, **options):
        training = Training("nothing")
        accumulator = gradfold.Accumulator(
            training.model, training.loss_fn, micro_batch_size=3, self_check=False, **options
        )
        for _ in range(3):
            training.zero()
            training.run(accumulator)
        training.zero()
        training.kind = "criterion"
        return training, accumulator

    def test_is_right_where_nothing_fails(self):
        training, accumulator = self.make()
        training.run(accumulator)
        assert_equal(training.gradients(), training.reference())

    def test_is_refused_where_it_would_count_twice(self):
        training, accumulator = self.make()
        with pytest.raises(gradfold.DoesNotFitError, match=r"a tensor of shape \((3, 4|3,)\) outside the model"):
            training.run(accumulator, fault=2)
        assert training.model.weight.grad is None

    def test_is_refused_where_a_micro_batch_is_to_be_left_out(self):
        training, accumulator = self.make(on_non_finite="skip_micro_batch")
        training.inputs[5] = float("nan")
        with pytest.raises(gradfold.ModelError, match=r"nn\.ModuleList\(\[model, criterion\]\)"):
            training.run(accumulator)

    def test_does_not_hide_a_gradient_that_is_not_finite(self):
        training, accumulator = self.make()
        loss_fn = training.loss_fn

        def bad(model, batch):
            return loss_fn(model, batch) + (model(batch[0]) * 0).abs().sqrt().sum()

        accumulator._run_loss = bad
        with pytest.raises(gradfold.NonFiniteGradientError):
            training.run(accumulator)

    def test_is_known_from_the_next_size_on_that_is_new(self):
        training, accumulator = self.make()
        training.inputs, training.labels = training.inputs.repeat(2, 1), training.labels.repeat(2)
        accumulator._micro_batcher.size = 5
        assert training.run(accumulator, fault=2).recoveries
        assert_equal(training.gradients(), training.reference())


def count_walks(monkeypatch, kind, new_inputs=False):
    walks = [0]
    graph_leaves = outside.graph_leaves

    def counted(tensors):
        walks[0] += 1
        return graph_leaves(tensors)

    monkeypatch.setattr(outside, "graph_leaves", counted)
    training, counts = Training(kind), []
    accumulator = gradfold.Accumulator(training.model, training.loss_fn, micro_batch_size=3, self_check=False)
    for _ in range(4):
        if new_inputs:
            training.inputs = training.inputs.detach().clone().requires_grad_()
        before = walks[0]
        training.run(accumulator)
        counts.append(walks[0] - before)
    return counts


def test_windows_that_show_nothing_new_are_not_walked_through(monkeypatch):
    assert count_walks(monkeypatch, "nothing") == [4, 0, 0, 0]
    assert count_walks(monkeypatch, "criterion") == [4, 4, 0, 0]
    assert count_walks(monkeypatch, "inputs", new_inputs=True) == [4, 4, 4, 4]


def test_what_is_made_for_one_micro_batch_does_not_wait_for_the_end_of_the_window():
    made: list[weakref.ref[Tensor]] = []
    alive = []

    def loss_fn(model, batch):
        gc.collect()
        alive.append(sum(one() is not None for one in made))
        noise = torch.zeros_like(batch).requires_grad_()
        made.append(weakref.ref(noise))
        return model(batch + noise).square().mean()

    model = nn.Linear(5, 4)
    gradfold.Accumulator(model, loss_fn, micro_batch_size=2, self_check=False).backward(torch.randn(8, 5))
    assert alive == [0, 0, 0, 0]
