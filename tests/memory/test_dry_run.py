"""Choosing a micro-batch leaves nothing in what functions hold, name, draw from and cache."""

from __future__ import annotations

import functools

import numpy
import pytest
import torch
from torch import nn

import gradfold

QUICK = gradfold.Auto(seconds=1.0, cache=False)
SEEN = []


@functools.lru_cache
def scales(num):
    return torch.arange(float(num)).cos()


@functools.lru_cache
def doubled(number):
    return 2 * number


def choose(loss_fn, model=None, batch=None, **options):
    model = nn.Linear(8, 1) if model is None else model
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=QUICK, **options)
    choice = accumulator.tune(torch.randn(32, 8) if batch is None else batch)
    return accumulator, choice


def square(model, batch):
    return model(batch).square().mean()


class Noisy(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, kind):
        super().__init__()
        self.inner = nn.Linear(8, 1)
        self.kind = kind
        self.own = torch.Generator().manual_seed(1)
        self.in_a_list = [torch.Generator().manual_seed(2)]
        self.of_numpy = numpy.random.default_rng(3)
        # A class of torch's, which is not followed: this one is seen as `generator=`.
        self.out_of_reach = torch.utils.data.RandomSampler(range(3), generator=torch.Generator().manual_seed(4))

    def forward(self, x):
        if self.kind == "numpy":
            return self.inner(x + self.of_numpy.random())
        generators = {"own": self.own, "list": self.in_a_list[0], "out of reach": self.out_of_reach.generator}
        return self.inner(x + torch.randn(x.shape, generator=generators[self.kind]))

    def states(self):
        generators = self.own, self.in_a_list[0], self.out_of_reach.generator
        return [one.get_state().tolist() for one in generators], str(self.of_numpy.bit_generator.state)


@pytest.mark.parametrize("kind", ["own", "list", "numpy", "out of reach"])
def test_generators_of_the_model_stay_where_they_are(kind):
    model = Noisy(kind)
    before = model.states()
    _, choice = choose(square, model)
    assert model.states() == before
    assert choice.peak_bytes


def test_generators_of_the_loss_stay_where_they_are():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()

    def loss_fn(model, batch):
        return square(model, batch + torch.rand(batch.shape, generator=generator))

    choose(loss_fn)
    assert torch.equal(generator.get_state(), before)


def test_generators_that_are_seen_in_probes_stay_where_they_are():
    """Out of reach, and drawn from before the search."""
    sampler = torch.utils.data.RandomSampler(range(3), generator=torch.Generator().manual_seed(4))
    before = sampler.generator.get_state()

    def loss_fn(model, batch):
        if float(batch.sum()) > 1e9:  # needs a value, so that probes are run
            return None
        return square(model, batch + torch.rand(batch.shape, generator=sampler.generator))

    choose(loss_fn)
    assert torch.equal(sampler.generator.get_state(), before)


def test_numbers_drawn_by_collate_are_drawn_again():
    calls = []

    def collate(samples):
        calls.append(len(samples))
        return torch.stack(samples) + torch.rand(()) + numpy.random.rand()

    samples = list(torch.zeros(16, 8))
    model = nn.Linear(8, 1)
    before = torch.get_rng_state(), str(numpy.random.get_state())
    choose(square, model, samples, collate=collate)
    assert torch.equal(torch.get_rng_state(), before[0]) and str(numpy.random.get_state()) == before[1]
    assert not calls


def test_caches_keep_no_fake_tensors():
    """Of a mask that is made once, by `functools` or by hand: the window after it would fail."""
    doubled.cache_clear()
    doubled(4)
    masks = {}

    def loss_fn(model, batch):
        if 8 not in masks:
            masks[8] = torch.arange(8.0)
        return square(model, batch * masks[8] * scales(8))

    accumulator, choice = choose(loss_fn)
    assert choice.peak_bytes and not masks
    accumulator.backward(torch.randn(32, 8))
    assert type(masks[8]) is type(scales(8)) is torch.Tensor
    assert doubled.cache_info().currsize == 1  # what was not asked for is kept


def test_a_plan_leaves_nothing_either():
    masks = {}

    def loss_fn(model, batch):
        if 8 not in masks:
            masks[8] = torch.arange(8.0)
        SEEN.append(len(batch))
        return square(model, batch * masks[8] * scales(8))

    scales.cache_clear()
    accumulator = gradfold.Accumulator(nn.Linear(8, 1), loss_fn, micro_batch_size=4)
    optimizer = torch.optim.Adam(accumulator.model.parameters())
    batch = torch.randn(32, 8)
    found = gradfold.plan(accumulator, batch, optimizer, memory="1GiB")
    assert found.source == "fake tensors" and not masks and not SEEN
    with pytest.raises(gradfold.DoesNotFitError):  # with savings
        gradfold.plan(accumulator, batch, optimizer, memory="300MiB")
    assert not masks and not SEEN
    gradfold.TrainStep(accumulator, optimizer)(batch)
    SEEN.clear()


def test_lists_have_what_they_had():
    losses = ["found"]

    def loss_fn(model, batch):
        loss = square(model, batch)
        losses.append(loss.detach())
        SEEN.append(len(batch))
        return loss, {"mean": loss.detach()}

    accumulator, _ = choose(loss_fn)
    assert losses == ["found"] and not SEEN
    result = accumulator.backward(torch.randn(32, 8))
    assert len(losses) - 1 >= result.num_micro_batches and all(type(one) is torch.Tensor for one in losses[1:])
    SEEN.clear()


def test_a_failed_search_leaves_nothing_either():
    seen = []

    def loss_fn(model, batch):
        seen.append(len(batch))
        if len(seen) > 20:
            raise KeyError
        return square(model, batch)

    with pytest.raises(KeyError):
        choose(loss_fn)
    assert not seen


def test_both_functions_of_a_two_phase_loss_are_followed():
    seen = []

    def statistic(model, batch):
        seen.append(1)
        return model(batch)

    def loss(model, statistics):
        seen.append(2)
        return statistics.square().mean()

    choose(gradfold.TwoPhaseLoss(statistic, loss))
    assert not seen


def test_a_teacher_in_the_closure_stays_as_it_is():
    teacher = nn.Sequential(nn.Linear(8, 1), nn.BatchNorm1d(1))
    before = teacher[1].running_mean.clone(), teacher[1].num_batches_tracked.clone()

    def loss_fn(model, batch):
        with torch.no_grad():
            aim = teacher(batch)
        teacher.last = aim
        return (model(batch) - aim).square().mean()

    _, choice = choose(loss_fn)
    assert choice.peak_bytes and not hasattr(teacher, "last")
    assert torch.equal(teacher[1].running_mean, before[0]) and torch.equal(teacher[1].num_batches_tracked, before[1])


def test_a_loss_that_takes_the_model_from_outside():
    """Copies do not reach it, so that probes run on the very model."""
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model.calls = 0
    before = {name: one.clone() for name, one in model.state_dict().items()}

    def loss_fn(_, batch):
        model.calls += 1
        return square(model, batch)

    choose(loss_fn, model)
    assert model.calls == 0 and all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
