"""State that a statistic leaves on the model: refused where the loss reads it, and nowhere else."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 4), nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("center", torch.zeros(4))
        self.average, self.aux, self.seen, self.calls = torch.zeros(4), 0.0, [], 0

    def project(self, z):
        self.calls += 1
        return self.head(z)


def spread(z, temperature=1.0):
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.T * temperature, torch.arange(len(z)).roll(1))


def counts(model, x):
    model.steps += 1
    return model.encoder(x)


def centers(model, x):
    z = model.encoder(x)
    model.center = 0.9 * model.center + 0.1 * z.detach().mean(0)
    return z


def averages(model, x):
    z = model.encoder(x)
    model.average.mul_(0.5).add_(z.detach().mean(0))
    return z


def leaves_a_term(model, x):
    z = model.encoder(x)
    model.aux = z.square().mean()
    return z


def appends(model, x):
    z = model.encoder(x)
    model.seen.append(float(z.detach().norm()))
    return z


def projects(model, x):
    return model.project(model.encoder(x))


READS = {
    "steps": (counts, lambda model, z: spread(z, 1 + 0.1 * model.steps)),
    "center": (centers, lambda model, z: spread(z - model.center)),
    "average": (averages, lambda model, z: spread(z - model.average)),
    "aux": (leaves_a_term, lambda model, z: spread(z) + model.aux),
    "seen": (appends, lambda model, z: spread(z, 1 + sum(model.seen[-2:]))),
}


@pytest.fixture
def x():
    return torch.randn(10, 6, dtype=torch.float64)


def accumulator(model, statistic, loss, **options):
    return gradfold.Accumulator(model, gradfold.TwoPhaseLoss(statistic, loss), micro_batch_size=4, **options)


@pytest.mark.parametrize("self_check", [False, True])
@pytest.mark.parametrize("name", READS)
def test_what_the_loss_reads_is_named(name, self_check, x):
    """It read the value of before: up to 56 % off, in silence."""
    model = Model().double()
    model.other = nn.BatchNorm1d(4).double()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    statistic, loss = READS[name]

    def moves_more(model, x):
        model.other(x[:, :4])
        model.calls += 1
        return statistic(model, x)

    options = {"batch_norm": "per_micro_batch", "self_check": self_check}
    before = {name: one.clone() for name, one in model.named_buffers()}
    with pytest.raises(gradfold.NotDecomposableError, match=rf"reads {name}, which statistic.*Return it") as caught:
        accumulator(model, moves_more, loss, **options).backward(x)
    assert caught.value.cause == "state"
    assert model.head.weight.grad.eq(1).all() and model.calls == 0 and model.seen == []
    assert all(torch.equal(one, before[name]) for name, one in model.named_buffers())


def test_a_value_that_counts_only_later_is_seen_in_a_later_window(x):
    model = Model().double()
    trained = accumulator(model, counts, lambda model, z: spread(z, 1.0 if model.steps < 6 else 2.0))
    trained.backward(x)
    with pytest.raises(gradfold.NotDecomposableError, match="reads steps"):
        trained.backward(x)


def noise(model, z):
    return spread(z + 0.01 * torch.randn_like(z) + 0.01 * random.random())


FINE = {
    "what nothing reads": (leaves_a_term, lambda model, z: spread(z)),
    "what is counted in both": (projects, lambda model, z: spread(model.project(z))),
    "a loss with random numbers": (counts, noise),
    "what the loss leaves itself": (projects, lambda model, z: (setattr(model, "aux", z.mean()), spread(z))[1]),
}


@pytest.mark.parametrize("name", FINE)
def test_a_loss_that_does_not_read_it_is_not_accused(name, x):
    model, (statistic, loss) = Model().double(), FINE[name]

    def seed():
        torch.manual_seed(3)
        random.seed(3)

    seed()
    expected = full_batch_gradient(model, lambda model: loss(model, statistic(model, x)))
    seed()
    accumulator(model, statistic, loss).backward(x)
    assert relative_error(gradients(model), expected) < 1e-12


def test_a_loss_with_a_sparse_gradient_can_be_tried(x):
    """The comparison with and without what was left had no kernel for it."""
    model = Model().double()
    model.words = nn.Embedding(5, 4, sparse=True).double()

    def loss(model, z):
        return spread(z @ model.words(torch.arange(4)))

    expected = full_batch_gradient(model, lambda model: loss(model, counts(model, x)))
    accumulator(model, counts, loss).backward(x)
    assert model.words.weight.grad.is_sparse
    assert relative_error(gradients(model), expected) < 1e-12
    with pytest.raises(gradfold.NotDecomposableError, match="reads steps"):
        accumulator(model, counts, lambda model, z: loss(model, z) * model.steps).backward(x)


def test_a_loss_that_is_never_the_same_is_not_accused(x):
    numbers, model = iter(range(100)), Model().double()
    accumulator(model, counts, lambda model, z: spread(z, 1 + next(numbers)), self_check=False).backward(x)
    assert model.steps == 3


def path_lengths(model, x):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.encoder(x).tanh().sum(), x, create_graph=True)
    return slope.square().sum(1).sqrt()


def forces(model, x):
    x = x.clone().requires_grad_()
    energy = model.encoder(x).tanh().square().sum(1)
    return energy, -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def adversarial(model, x):
    """One step uphill, from an inner backward pass that trains nothing."""
    moved = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.encoder(moved).square().sum(), moved)
    return model.encoder(x + 0.1 * slope.sign())


def only_with_a_graph(model, x):
    """As a fast path for inference, whose values are others."""
    z = model.encoder(x)
    return z.tanh() if torch.is_grad_enabled() else z.clamp(-1, 1)


def variance(model, lengths):
    return (lengths - lengths.mean()).square().mean()


def of_forces(model, found):
    energy, force = found
    return variance(model, energy) + (force - force.mean(0)).square().mean()


DIFFERENTIATING = {
    "path lengths": (path_lengths, variance),
    "forces": (forces, of_forces),
    "adversarial rows": (adversarial, lambda model, z: spread(z)),
    "another path with a graph": (only_with_a_graph, lambda model, z: spread(z)),
}


@pytest.mark.parametrize("self_check", [False, True])
@pytest.mark.parametrize("name", DIFFERENTIATING)
def test_a_statistic_that_differentiates_has_a_graph_to_do_so(name, self_check, x):
    """It ended in an error of torch, since the first pass keeps no graph."""
    model, (statistic, loss) = Model().double(), DIFFERENTIATING[name]
    expected = full_batch_gradient(model, lambda model: loss(model, statistic(model, x)))
    trained = accumulator(model, statistic, loss, self_check=self_check)
    for _ in range(2):
        model.zero_grad()
        trained.backward(x)
        assert relative_error(gradients(model), expected) < 1e-12


def test_an_error_of_the_statistic_is_the_users(x):
    model = Model().double()
    model.head.weight.grad = torch.ones_like(model.head.weight)

    def fails(model, x):
        raise KeyError("rows")

    with pytest.raises(KeyError, match="rows"):
        accumulator(model, fails, lambda model, z: spread(z), self_check=False).backward(x)
    assert model.head.weight.grad.eq(1).all()
