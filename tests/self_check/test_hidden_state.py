"""State that a forward pass leaves for the next one: found between micro-batches, and named by its attribute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import gradients, relative_error
from torch import nn

import gradfold
from gradfold.errors import NotDecomposableError


class Centered(nn.Module):
    """Subtracts a running mean, a plain attribute, that each forward pass moves first."""

    def __init__(self):
        super().__init__()
        self.layer, self.mean = nn.Linear(5, 3), torch.zeros(5).double()

    def forward(self, inputs):
        self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(0)
        return self.layer(inputs - self.mean)


class CenteredInPlace(Centered):
    def forward(self, inputs):
        self.mean.mul_(0.9).add_(inputs.detach().mean(0), alpha=0.1)
        return self.layer(inputs - self.mean)


class CenteredInList(Centered):
    def __init__(self):
        super().__init__()
        self.mean = [torch.zeros(5).double()]

    def forward(self, inputs):
        self.mean.append(0.9 * self.mean[-1] + 0.1 * inputs.detach().mean(0))
        return self.layer(inputs - self.mean[-1])


class Carried(nn.Module):
    """Goes on from the last hidden state where it has as many rows (truncated back-propagation through time)."""

    def __init__(self):
        super().__init__()
        self.cell, self.layer, self.mean = nn.GRUCell(5, 4), nn.Linear(4, 3), None

    def forward(self, inputs):
        before = self.mean if self.mean is not None and len(self.mean) == len(inputs) else None
        hidden = self.cell(inputs, before)
        self.mean = hidden.detach()
        return self.layer(hidden)


class CarriedAlways(Carried):
    """The same, but fails on another number of rows."""

    def forward(self, inputs):
        hidden = self.cell(inputs, self.mean)
        self.mean = hidden.detach()
        return self.layer(hidden)


class Annealed(nn.Module):
    """Divides by the number of its calls."""

    def __init__(self):
        super().__init__()
        self.layer, self.mean = nn.Linear(5, 3), 1

    def forward(self, inputs):
        self.mean += 1
        return self.layer(inputs) / self.mean


MODELS = [Centered, CenteredInPlace, CenteredInList, Carried, CarriedAlways, Annealed]


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batch_of(num_rows=16):
    return torch.randn(num_rows, 5).double() + 1, torch.randint(0, 3, (num_rows,))


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("size", [1, 4, 8])
def test_state_between_micro_batches_is_named(make, size):
    model = nn.ModuleDict({"inner": make().double()})

    def loss_fn(model, batch):
        return F.cross_entropy(model["inner"](batch[0]), batch[1])

    with pytest.raises(NotDecomposableError, match=r"inner\.mean") as caught:
        gradfold.Accumulator(model, loss_fn, micro_batch_size=size).backward(batch_of())
    assert caught.value.cause == "state" and not gradients(model)


class Cached(nn.Module):
    """Makes a first state by the number of rows, which none changes after."""

    def __init__(self):
        super().__init__()
        self.cell, self.layer, self.first = nn.GRUCell(5, 4), nn.Linear(4, 3), None

    def forward(self, inputs):
        if self.first is None:
            self.first = torch.zeros(len(inputs), 4, dtype=inputs.dtype)
        return self.layer(self.cell(inputs, self.first))


class Noting(nn.Module):
    """Keeps its last output, and how often it ran, and reads neither."""

    def __init__(self):
        super().__init__()
        self.layer, self.last, self.calls = nn.Linear(5, 3), None, 0

    def forward(self, inputs):
        self.calls += 1
        self.last = self.layer(inputs)
        return self.last


@pytest.mark.parametrize("make", [Cached, Noting])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_state_that_the_next_pass_does_not_depend_on_is_no_matter(make, size):
    model, batch = make().double(), batch_of()
    reference = make().double()
    reference.load_state_dict(model.state_dict())
    loss_fn(reference, batch).backward()
    gradfold.Accumulator(model, loss_fn, micro_batch_size=size).backward(batch)
    assert relative_error(gradients(model), gradients(reference)) <= 1e-12
    if make is Noting:
        assert model.calls == 16 // size


class Positives(nn.Module):
    """Divides by a moving average of a count of the batch, a buffer: no weighting, and no rewind, repairs that."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.register_buffer("average", torch.ones(()))

    def forward(self, inputs, labels):
        self.average.mul_(0.9).add_(0.1 * (labels > 0).sum())
        losses = F.cross_entropy(self.layer(inputs), labels, reduction="none")
        return (losses * (labels > 0)).sum() / self.average


@pytest.mark.parametrize("size", [4, 8])
def test_a_buffer_that_moves_by_what_is_in_the_batch_is_named(size):
    with pytest.raises(NotDecomposableError, match="average") as caught:
        gradfold.Accumulator(Positives().double(), lambda model, batch: model(*batch), micro_batch_size=size).backward(
            batch_of()
        )
    assert caught.value.cause == "state"


def test_a_buffer_that_moves_and_is_not_read_is_not_blamed():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, inputs):
            self.calls.add_(len(inputs))
            return self.layer(inputs)

    def coupled(model, batch):
        outputs = F.normalize(model(batch[0]), dim=1)
        return F.cross_entropy(5 * outputs @ outputs.T, torch.arange(len(outputs)).roll(1))

    with pytest.raises(NotDecomposableError, match="depend on each other") as caught:
        gradfold.Accumulator(Counting().double(), coupled, micro_batch_size=8).backward(batch_of())
    assert caught.value.cause == "coupled"


class Teacher(nn.Module):
    """Its target follows the student by a moving average, one step per forward pass."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(5, 3), nn.Linear(5, 3).requires_grad_(False)

    def forward(self, inputs):
        with torch.no_grad():
            self.teacher.weight.lerp_(self.student.weight, 0.1)
        return (self.student(inputs) - self.teacher(inputs)).square().mean()


@pytest.mark.parametrize("size", [1, 4, 8])
def test_a_frozen_parameter_that_moves_is_named(size):
    model = Teacher().double()
    before = model.teacher.weight.clone()
    with pytest.raises(NotDecomposableError, match=r"teacher\.weight") as caught:
        gradfold.Accumulator(model, lambda model, batch: model(batch[0]), micro_batch_size=size).backward(batch_of())
    assert caught.value.cause == "state" and torch.equal(model.teacher.weight, before)
