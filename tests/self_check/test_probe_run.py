"""Probe runs have no side effects, and a training with the self-check is bitwise one without."""

from __future__ import annotations

import copy
import random
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from run_log import RunLog
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold.engine.backward import BackPropagation
from gradfold.self_check.probe_run import ProbeRun, sample_gradients
from gradfold.state.rng import RandomStates


def probed(model, loss_fn, batch, frozen=()):
    """What one probe run gave."""
    with ProbeRun(model, loss_fn, BackPropagation(), frozen) as probe:
        return probe.run(batch, lambda name: 1.0)


def squares(model, batch):
    return model(batch).square().mean()


def checked(model, loss_fn, batch, at=None, **options):
    """Accumulate; what `at()` returns right after the self-check."""
    accumulator = gradfold.Accumulator(model, loss_fn, **({"micro_batch_size": 8} | options))
    check, seen = accumulator._self_check.check, []

    def watched(*args, **keywords):
        check(*args, **keywords)
        seen.append(at() if at is not None else None)

    accumulator._self_check.check = watched
    accumulator.backward(batch)
    assert seen
    return seen[0]


class Watched(nn.Module):
    """A linear layer whose forward pass runs `change(self, x)`; returns what that returns, if anything."""

    def __init__(self, change=lambda self, x: None, **attributes):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.change = change
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        change = self.change(self, x)
        return self.linear(x) if change is None else self.linear(x) + change


# --- What a run gives


def test_a_run_gives_gradients_and_losses_and_leaves_neither():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    outcome = probed(model, lambda model, batch: {"a": squares(model, batch), "b": model(batch).mean()}, x)
    (squares(model, x) + model(x).mean()).backward()
    assert torch.equal(outcome.gradients[0], model.weight.grad.flatten())
    assert list(outcome.losses) == ["a", "b"]
    assert not any(loss.requires_grad for loss in outcome.losses.values())


def test_a_run_back_propagates_what_has_a_share_and_only_the_term_asked_for():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)

    def loss_fn(model, batch):
        return {"a": squares(model, batch), "b": model(batch).mean()}, {"metric": torch.ones(())}

    def slope(shares, only=None):
        with ProbeRun(model, loss_fn, BackPropagation()) as probe:
            return probe.run(x, shares.__getitem__, only=only).gradients[0]

    both = slope({"a": 0.5, "b": 2.0})
    torch.testing.assert_close(slope({"a": 0.5, "b": 2.0}, "a") + slope({"a": 0.5, "b": 2.0}, "b"), both)
    assert torch.equal(slope({"a": 0.5, "b": 0.0}), slope({"a": 0.5, "b": 2.0}, "a"))


def test_a_sample_of_gradients_is_bounded_and_linear():
    large, small, sparse = nn.Linear(1000, 1000), nn.Linear(2, 2), nn.Embedding(5, 3, sparse=True)
    complex_one = nn.Parameter(torch.randn(3, dtype=torch.complex64))
    parameters = [
        *large.parameters(),
        *small.parameters(),
        *sparse.parameters(),
        complex_one,
        nn.Parameter(torch.ones(2)),
    ]
    loss = large(torch.randn(2, 1000)).sum() + small(torch.randn(2, 2)).sum() + sparse(torch.tensor([1, 1, 2])).sum()
    (loss + complex_one.abs().sum()).backward()
    sampled = sample_gradients(parameters)
    assert sum(len(one) for one in sampled if one is not None) <= 2**17
    assert len(sampled[0]) > 1000
    assert torch.equal(sampled[2], small.weight.grad.flatten())
    assert torch.equal(sampled[4], torch.full((3,), 3.0))  # the sum over the rows of the table
    assert torch.equal(sampled[5], torch.view_as_real(complex_one.grad).flatten())
    assert sampled[6] is None


def test_a_sample_of_half_precision_is_taken_in_float32_and_is_a_copy():
    model = nn.Linear(4, 3, dtype=torch.bfloat16)
    squares(model, torch.randn(5, 4, dtype=torch.bfloat16)).backward()
    sampled = sample_gradients(list(model.parameters()))
    assert sampled[0].dtype == torch.float32
    model = nn.Linear(4, 3)
    squares(model, torch.randn(5, 4)).backward()
    sampled = sample_gradients(list(model.parameters()))
    kept = sampled[0].clone()
    model.weight.grad.zero_()
    assert torch.equal(sampled[0], kept)


# --- Gradients


def test_grad_of_own_parameters_is_the_same_tensor_and_is_added_to_once():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(16, 4)
    model[1].requires_grad_(False)
    expected = copy.deepcopy(model)
    squares(expected, x).backward()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    kept = [parameter.grad for parameter in model.parameters()]
    gradfold.Accumulator(model, squares, micro_batch_size=8).backward(x)
    for parameter, gradient, reference in zip(model.parameters(), kept, expected.parameters(), strict=True):
        assert parameter.grad is gradient
        torch.testing.assert_close(gradient, 1 + (0 if reference.grad is None else reference.grad) + 0 * gradient)


def test_grad_of_leaves_outside_of_the_model_is_as_it_was():
    model, critic, empty = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)
    critic.weight.grad = kept = torch.ones_like(critic.weight)

    def loss_fn(model, batch):
        return (critic(model(batch)) + empty(model(batch))).mean()

    probed(model, loss_fn, torch.randn(5, 4))
    assert critic.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert critic.bias.grad is None
    assert empty.weight.grad is None


def test_grad_of_leaves_behind_a_checkpoint_is_as_it_was():
    model, critic = nn.Linear(4, 4), nn.Linear(4, 1)
    critic.weight.grad = kept = torch.ones_like(critic.weight)
    probed(model, lambda m, b: checkpoint(critic, m(b), use_reentrant=False).mean(), torch.randn(5, 4))
    assert critic.weight.grad is kept
    assert torch.equal(kept, torch.ones_like(kept))
    assert critic.bias.grad is None


def test_grad_of_a_batch_that_requires_grad_is_as_it_was():
    x = torch.randn(16, 4, requires_grad=True)
    x.grad = kept = torch.ones_like(x)
    model = nn.Linear(4, 3)

    def unchanged():
        assert x.grad is kept
        return torch.equal(kept, torch.ones_like(kept))

    assert checked(model, squares, x, unchanged)


# --- Buffers


def test_batch_norm_that_is_accepted_keeps_its_statistics_and_its_mode():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    before, versions = copy.deepcopy(model[1]), [buffer._version for buffer in model[1].buffers()]

    def unchanged():
        assert model[1].training
        assert [buffer._version for buffer in model[1].buffers()] == versions
        return all(map(torch.equal, model[1].buffers(), before.buffers()))

    assert checked(model, squares, torch.randn(16, 4), unchanged, batch_norm="per_micro_batch")


def test_buffers_that_are_rebound_written_or_made_are_as_before():
    def change(self, x):
        self.rebound = self.rebound + 1
        self.written.mul_(2)
        self.made = torch.ones(2)
        return self.still

    model = Watched(change)
    for name in ("rebound", "written", "made", "still"):
        model.register_buffer(name, None if name == "made" else torch.ones(3))
    before = {name: buffer for name, buffer in model.named_buffers() if buffer is not None}
    version = model.still._version
    probed(model, squares, torch.randn(5, 4))
    assert dict(model.named_buffers()).keys() == before.keys()
    for name, buffer in before.items():
        assert getattr(model, name) is buffer
        assert torch.equal(buffer, torch.ones(3)), name
    assert model.still._version == version


def test_spectral_norm_is_as_before():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    probed(model, squares, torch.randn(5, 4))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


# --- Random states


def noisy(model, batch):
    return squares(model, batch + torch.randn_like(batch) * random.random() * np.random.rand())


def random_states():
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), (numpy[1].tolist(), *numpy[2:])


def test_random_states_are_as_before():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    before = random_states()
    probed(model, noisy, x)
    assert random_states() == before


def test_rewind_makes_the_same_numbers_come_again():
    model, x = Watched(lambda self, x: self.moved.add_(1)), torch.randn(5, 4)
    model.register_buffer("moved", torch.zeros(3))
    with ProbeRun(model, noisy, BackPropagation()) as probe:
        first = probe.run(x, lambda name: 1.0)
        assert probe.snapshot.changed_buffers() == ["moved"]
        assert probe.snapshot.has_drawn()
        second = probe.run(x, lambda name: 1.0)
        probe.snapshot.rewind()
        assert probe.snapshot.changed_buffers() == []
        assert not probe.snapshot.has_drawn()
        third = probe.run(x, lambda name: 1.0)
    assert not torch.equal(first.gradients[0], second.gradients[0])
    assert torch.equal(first.gradients[0], third.gradients[0])


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: random.gauss(0, 1), np.random.randn])
def test_draws_on_the_host_are_seen(draw):
    before = RandomStates.record([])
    assert before.moved_on_host() is None
    draw()
    assert before.moved_on_host() in ("random", "numpy.random")


def test_a_custom_generator_is_set_back():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()

    def loss_fn(model, batch):
        return squares(model, batch + torch.randn(batch.shape, generator=generator))

    x = torch.randn(16, 4)
    assert checked(nn.Linear(4, 3), loss_fn, x, lambda: torch.equal(generator.get_state(), before))


def test_a_collate_function_that_draws_leaves_the_random_states_as_without_the_self_check():
    def collate(samples):
        return torch.stack(samples) + torch.rand(()) * random.random() * np.random.rand()

    after = []
    for self_check in (True, False):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        accumulator = gradfold.Accumulator(
            nn.Linear(4, 3), squares, micro_batch_size=8, collate=collate, self_check=self_check
        )
        accumulator.backward(list(torch.randn(16, 4)))
        after.append(random_states())
    assert after[0] == after[1]


# --- Modules and inputs


def test_attributes_of_modules_are_as_before():
    def change(self, x):
        self.counter += 1
        self.average = self.average * 0.9
        self.fresh = 3
        self.flag = True
        self.once = (1, 2)
        self.name = 5
        self.pair = None

    average = torch.ones(2)
    model = Watched(change, counter=0, average=average, flag=False, once=None, name="a", pair=(1, 2))
    before = dict(vars(model))
    probed(model, squares, torch.randn(5, 4))
    assert vars(model).keys() == before.keys()
    for name, value in before.items():
        assert vars(model)[name] is value, name


def test_plain_tensors_and_lists_of_modules_are_as_before():
    def change(self, x):
        self.total.add_(1)
        self.log.append(1)

    model = Watched(change, total=torch.zeros(()), log=[])
    probed(model, squares, torch.randn(5, 4))
    assert model.total == 0
    assert model.log == []


def test_a_list_and_a_counter_in_a_closure_are_as_before():
    log, count = [], 0

    def loss_fn(model, batch):
        nonlocal count
        count += 1
        log.append(len(batch))
        return squares(model, batch)

    assert checked(nn.Linear(4, 3), loss_fn, torch.randn(16, 4), lambda: (count, [*log])) == (0, [])
    assert (count, log) == (2, [8, 8])  # the window's own


def test_a_module_may_keep_an_inference_tensor():
    """A table that was made under `torch.inference_mode()` has no version to tell a change by."""
    with torch.inference_mode():
        table = torch.ones(3)
    model = Watched(lambda self, x: self.table.sum() * 0, table=table)
    probed(model, squares, torch.randn(5, 4))
    assert model.table is table


@pytest.mark.parametrize("cause", [None, "coupled"])
def test_a_frozen_parameter_may_be_made_in_inference_mode(cause):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.inference_mode():
        for name, table in [("weight", torch.randn(2, 3)), ("bias", torch.randn(2))]:
            setattr(model[1], name, nn.Parameter(table, requires_grad=False))

    def loss_fn(model, batch):
        weight, bias = model[1].weight.clone(), model[1].bias.clone()
        outputs = F.linear(model[0](batch), weight, bias)
        return (outputs if cause is None else outputs.softmax(0)).square().mean()

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4)
    with nullcontext() if cause is None else pytest.raises(gradfold.NotDecomposableError) as refused:
        accumulator.backward(torch.randn(12, 4))
    assert cause is None or refused.value.cause == cause


def test_modes_of_modules_are_as_before():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[2].eval()
    modes = RunLog()

    def loss_fn(model, batch):
        modes.append([module.training for module in model.modules()])
        model.eval()
        return squares(model, batch)

    probed(model, loss_fn, torch.randn(5, 4), frozen=[model[1]])
    assert modes == [[True, True, False, False, False]]
    assert [module.training for module in model.modules()] == [True, True, True, False, False]


def test_inputs_that_a_model_changes_in_place_are_as_before():
    x = torch.randn(16, 4)
    kept = x.clone()

    def loss_fn(model, batch):
        batch["x"].mul_(2)
        batch["more"][0].zero_()
        return squares(model, batch["x"])

    assert checked(nn.Linear(4, 3), loss_fn, {"x": x, "more": [x]}, lambda: torch.equal(x, kept))


# --- Failures


class Failing(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ctx.error


def failing(call, error, in_backward):
    """A model that changes all that it can and fails in that call, and a loss with a critic of its own."""

    def change(self, x):
        self.counter += 1
        self.moved.add_(1)
        self.train(self.counter % 2 == 0)
        x.mul_(2)
        if self.counter == call and not in_backward:
            raise error

    model, critic = Watched(change, counter=0), nn.Linear(3, 1)
    model.register_buffer("moved", torch.zeros(3))
    model.linear.weight.grad = torch.ones(3, 4)

    def loss_fn(model, batch):
        loss = critic(model(batch)).square().mean()
        return Failing.apply(loss, error) if model.counter == call and in_backward else loss

    return model, critic, loss_fn


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_nothing_is_left_when_a_run_fails(error, call, in_backward):
    model, critic, loss_fn = failing(call, error, in_backward)
    x = torch.randn(16, 4)
    values, gradient, before = x.clone(), model.linear.weight.grad, random_states()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8)
    check = accumulator._self_check.check

    def stop_after_it(*args, **keywords):
        check(*args, **keywords)
        raise Stop

    accumulator._self_check.check = stop_after_it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a part that fails is no proof, and says so
        with pytest.raises((type(error), Stop)) as caught:
            accumulator.backward(x)
    assert caught.type is Stop or call == 1 or type(error) is KeyboardInterrupt
    assert random_states() == before
    assert torch.equal(x, values)
    assert model.counter == 0
    assert torch.equal(model.moved, torch.zeros(3))
    assert model.training
    assert model.linear.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(3, 4))
    assert model.linear.bias.grad is None
    assert critic.weight.grad is None


class Stop(Exception):
    """Ends a window right after the self-check."""


# --- A whole training


def training(self_check, batch_norm=None, generator_seed=None, num_updates=5):
    """Everything that a training leaves: weights, buffers, losses, metrics, states."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    norm = nn.BatchNorm1d(8) if batch_norm else nn.LayerNorm(8)
    generator = None if generator_seed is None else torch.Generator().manual_seed(generator_seed)
    model = nn.Sequential(
        nn.Linear(4, 8),
        norm,
        nn.Tanh(),
        nn.Dropout(0.3 if generator is None else 0.0),
        parametrizations.spectral_norm(nn.Linear(8, 3)).eval(),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def loss_fn(model, batch):
        x, y = batch
        noise = 0 if generator is None else torch.randn(x.shape, generator=generator)
        logits = model(x + noise)
        return F.cross_entropy(logits, y), {"right": (logits.argmax(1) == y).float()}

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=5, batch_norm=batch_norm, self_check=self_check)
    trace = []
    for update in range(num_updates):
        result = accumulator.backward((torch.randn(13 + update % 2, 4), torch.randint(0, 3, (13 + update % 2,))))
        optimizer.step()
        optimizer.zero_grad()
        trace += [result.loss, *result.metrics.values()]
    trace += [*model.state_dict().values(), *[entry["momentum_buffer"] for entry in optimizer.state.values()]]
    trace += [torch.get_rng_state(), *([] if generator is None else [generator.get_state()])]
    return trace, random_states()


@pytest.mark.parametrize("batch_norm", [None, "per_micro_batch"])
@pytest.mark.parametrize("generator_seed", [None, 1])
def test_a_training_with_the_self_check_is_bitwise_one_without(batch_norm, generator_seed):
    (found, hosts), (expected, other) = (training(check, batch_norm, generator_seed) for check in (True, False))
    assert len(found) == len(expected)
    for index, (value, reference) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(value, reference), index
    assert hosts == other
