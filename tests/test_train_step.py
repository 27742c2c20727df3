"""One update: everything in the right order, once, and what TrainStep cannot drive."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from reference import gradients, relative_error
from torch import nn

import gradfold
import gradfold.train_step
from gradfold.errors import OptionError, TrainStepError

F = nn.functional


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def make(rows=7):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return model, (torch.randn(rows, 3).double() + 1e4, torch.randn(rows, 1).double())


def step_for(model, optimizer, *args, size=2, loss_fn=loss_fn, weight="samples", **options):
    # Without the self-check, since what is run is counted here.
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, weight=weight, self_check=False)
    return gradfold.TrainStep(accumulator, optimizer, *args, **options)


class TestOrder:
    def events(self, monkeypatch, rows=3, weight="samples", **options):
        events = []
        model = nn.Linear(3, 1).double()

        class Optimizer(torch.optim.SGD):
            def zero_grad(self, *args, **kwargs):
                events.append("zero")
                super().zero_grad(*args, **kwargs)

            def step(self, *args, **kwargs):
                events.append("step")
                return super().step(*args, **kwargs)

        class Schedule(torch.optim.lr_scheduler.LambdaLR):
            def step(self, *args):
                if self._step_count:  # not the one in the constructor
                    events.append("schedule")
                super().step(*args)

        def recorded(*args, original=gradfold.train_step.clip_norm):
            events.append("clip")
            return original(*args)

        monkeypatch.setattr(gradfold.train_step, "clip_norm", recorded)

        def watched(model, batch):
            events.append("F")
            output = model(batch[0])
            output.register_hook(lambda gradient: events.append("B"))
            return F.mse_loss(output, batch[1])

        optimizer = Optimizer(model.parameters(), 0.1)
        schedule = Schedule(optimizer, lambda _: 1.0)
        step = step_for(model, optimizer, schedule, loss_fn=watched, weight=weight, **options)
        events.clear()
        step((torch.randn(rows, 3).double(), torch.randn(rows, 1).double()))
        return " ".join(events)

    def test_zero_first_then_backward_clip_step_and_schedule(self, monkeypatch):
        assert self.events(monkeypatch, max_grad_norm=1.0) == "zero F B F B clip step schedule"

    def test_without_a_limit_nothing_is_clipped(self, monkeypatch):
        assert self.events(monkeypatch) == "zero F B F B step schedule"

    @pytest.mark.filterwarnings("ignore:weight= is 0")
    def test_a_batch_that_weighs_nothing_is_neither_clipped_nor_stepped(self, monkeypatch):
        assert self.events(monkeypatch, weight=lambda batch: 0, max_grad_norm=1.0) == "zero"


def test_updates_are_those_of_the_full_batch_with_clipping_and_schedule():
    model, _ = make()
    twin = copy.deepcopy(model)
    ours, theirs = (torch.optim.AdamW(m.parameters(), 0.01) for m in (model, twin))
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) for optimizer in (ours, theirs)]
    step = step_for(model, ours, schedules[0], max_grad_norm=0.5)
    for rows in (7, 1, 4, 5):
        _, batch = make(rows)
        result = step(batch)
        theirs.zero_grad()
        loss = loss_fn(twin, batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        theirs.step()
        schedules[1].step()
        assert result.loss.item() == pytest.approx(loss.item(), rel=1e-9)
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-9)
        assert result.applied and result.num_micro_batches == math.ceil(rows / 2)
        assert (result.num_samples, result.weight) == (rows, rows)
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert (step.updates, step.skipped, step.samples) == (4, 0, 17)


def test_gradients_stand_after_the_step_to_be_looked_at():
    model, batch = make()
    step_for(model, torch.optim.SGD(model.parameters(), 0.1))(batch)
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


def test_gradients_that_another_loss_left_do_not_leak_in():
    """A GAN: the generator's loss runs through the discriminator, and leaves gradients there."""
    torch.manual_seed(3)
    generator, discriminator = nn.Linear(2, 3).double(), nn.Linear(3, 1).double()
    noise, real = torch.randn(5, 2).double(), torch.randn(5, 3).double()

    def generator_loss(model, batch):
        return F.softplus(-discriminator(model(batch))).mean()

    def discriminator_loss(model, batch):
        fake, real = batch
        return (F.softplus(model(generator(fake))) + F.softplus(-model(real))).mean()

    twins = copy.deepcopy(generator), copy.deepcopy(discriminator)
    steps = [
        step_for(generator, torch.optim.SGD(generator.parameters(), 0.1), loss_fn=generator_loss),
        step_for(discriminator, torch.optim.SGD(discriminator.parameters(), 0.1), loss_fn=discriminator_loss),
    ]
    for _ in range(2):
        steps[0](noise)
        steps[1]((noise, real))
    for _ in range(2):
        loss = F.softplus(-twins[1](twins[0](noise))).mean()
        descend(twins[0], torch.autograd.grad(loss, twins[0].parameters()))
        loss = (F.softplus(twins[1](twins[0](noise))) + F.softplus(-twins[1](real))).mean()
        descend(twins[1], torch.autograd.grad(loss, twins[1].parameters()))
    for model, twin in zip((generator, discriminator), twins, strict=True):
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@torch.no_grad()
def descend(model, gradient, rate=0.1):
    for one, slope in zip(model.parameters(), gradient, strict=True):
        one -= rate * slope


def test_gradients_of_the_model_and_of_the_optimizer_s_other_parameters_are_zeroed():
    model, batch = make()
    extra = nn.Parameter(torch.ones(1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([*model[2].parameters(), extra], 0.1)
    for one in [*model.parameters(), extra]:
        one.grad = torch.full_like(one, 7)
    step_for(model, optimizer)(batch)
    assert extra.grad is None and extra.item() == 1
    assert model[0].weight.grad is None


class TestClipping:
    @pytest.mark.parametrize("limit", [1e-3, 1.0, 1e12])
    def test_is_that_of_the_full_batch(self, limit):
        model, batch = make()
        twin = copy.deepcopy(model)
        result = step_for(model, torch.optim.SGD(model.parameters(), 0.1), max_grad_norm=limit)(batch)
        loss_fn(twin, batch).backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), limit)
        assert relative_error(gradients(model), gradients(twin)) < 1e-12
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-12)
        assert result.grad_norm.dim() == 0 and not result.grad_norm.requires_grad

    def test_takes_sparse_gradients(self):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Linear(3, 1)).double()
        twin = nn.Sequential(nn.Embedding(9, 3), nn.Linear(3, 1)).double()
        twin.load_state_dict(model.state_dict())
        ids = torch.randint(0, 4, (11,))
        result = step_for(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            loss_fn=lambda m, b: m(b).square().mean(),
            max_grad_norm=0.1,
        )(ids)
        optimizer = torch.optim.SGD(twin.parameters(), 0.1)
        twin(ids).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        assert norm > 0.1, "something is clipped"
        optimizer.step()
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-12)
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=0)

    def test_an_infinite_limit_measures_only(self):
        model, batch = make()
        twin = copy.deepcopy(model)
        result = step_for(model, torch.optim.SGD(model.parameters(), 0.1), max_grad_norm=math.inf)(batch)
        loss_fn(twin, batch).backward()
        assert relative_error(gradients(model), gradients(twin)) < 1e-12
        assert result.grad_norm.item() == pytest.approx(
            torch.cat([one.grad.flatten() for one in twin.parameters()]).norm().item(), rel=1e-12
        )

    def test_none_measures_nothing(self):
        model, batch = make()
        assert step_for(model, torch.optim.SGD(model.parameters(), 0.1))(batch).grad_norm is None

    @pytest.mark.parametrize("limit", [0, -1.0, math.nan, "1.0"])
    def test_a_limit_that_cannot_work_is_refused(self, limit):
        model, _ = make()
        with pytest.raises(OptionError, match=r"max_grad_norm=.*positive number or None") as caught:
            step_for(model, torch.optim.SGD(model.parameters(), 0.1), max_grad_norm=limit)
        assert repr(limit) in str(caught.value)


class TestEmptyBatches:
    @pytest.mark.filterwarnings("ignore:weight= is 0")
    def test_are_counted_as_skipped_and_change_nothing(self):
        model, batch = make()
        optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.5)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        weights = iter([1.0] * 4 + [0.0] * 4 + [1.0] * 4)
        step = step_for(model, optimizer, schedule, weight=lambda batch: next(weights), max_grad_norm=1.0)
        step(batch)
        before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), schedule.state_dict()])
        result = step(batch)
        assert not result.applied and result.grad_norm is None and result.loss.isnan()
        assert (step.updates, step.skipped, step.samples) == (1, 1, 14)
        after = [model.state_dict(), optimizer.state_dict(), schedule.state_dict()]
        assert str(after) == str(before)
        assert step(batch).applied and (step.updates, step.skipped, step.samples) == (2, 1, 21)

    @pytest.mark.filterwarnings("ignore:weight= is 0")
    def test_are_empty_though_a_metric_weighs_something(self):
        """What is left of the loss decides: there is no gradient, so there is no update."""
        model, batch = make()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        step = step_for(
            model,
            optimizer,
            schedule,
            loss_fn=lambda model, batch: (loss_fn(model, batch), {"seen": 1.0}),
            weight={"loss": lambda batch: 0, "seen": "samples"},
        )
        result = step(batch)
        assert not result.applied and (step.updates, step.skipped) == (0, 1)
        assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_batch_that_fails_counts_for_nothing_and_moves_nothing():
    model, batch = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = step_for(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(gradfold.NonFiniteLossError):
        step((batch[0] * math.nan, batch[1]))
    assert str(model.state_dict()) == str(before)
    assert (step.updates, step.skipped, step.samples) == (0, 0, 0) and optimizer.param_groups[0]["lr"] == 0.1


def test_the_schedule_ticks_once_per_applied_update():
    model, batch = make()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    step = step_for(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), size=1)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        step(batch)
    assert rates == [1.0, 0.5, 0.25]


class TestState:
    def trained(self, num_batches, seed=1):
        torch.manual_seed(seed)
        model, _ = make()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        step = step_for(model, optimizer, schedule, max_grad_norm=1.0)
        for n in range(num_batches):
            step(self.batch(n))
        return step

    def batch(self, n):
        generator = torch.Generator().manual_seed(n)
        rows = 3 + n
        return torch.randn(rows, 3, generator=generator).double(), torch.randn(rows, 1, generator=generator).double()

    def test_goes_round_through_a_file_and_the_run_goes_on_bitwise(self, tmp_path):
        whole, first = self.trained(6), self.trained(3)
        torch.save(
            [first.state_dict(), first.accumulator.model.state_dict(), first.optimizer.state_dict()],
            tmp_path / "run.pt",
        )
        resumed = self.trained(0, seed=9)
        states = torch.load(tmp_path / "run.pt", weights_only=True)
        resumed.load_state_dict(states[0])
        resumed.accumulator.model.load_state_dict(states[1])
        resumed.optimizer.load_state_dict(states[2])
        for n in range(3, 6):
            resumed(self.batch(n))
        for one, other in zip(
            resumed.accumulator.model.parameters(), whole.accumulator.model.parameters(), strict=True
        ):
            assert torch.equal(one, other)
        assert resumed.state_dict() == whole.state_dict()
        assert (resumed.updates, resumed.samples) == (6, sum(range(3, 9)))

    def test_holds_counters_schedule_and_accumulator(self):
        step = self.trained(2)
        state = step.state_dict()
        assert (state["updates"], state["skipped"], state["samples"]) == (2, 0, 7)
        assert state["scheduler"]["last_epoch"] == 2
        assert state["accumulator"] == step.accumulator.state_dict()

    @pytest.mark.parametrize("saved", [True, False])
    def test_with_and_without_a_schedule_do_not_fit_and_nothing_is_half_loaded(self, saved):
        model, _ = make()
        without = step_for(model, torch.optim.SGD(model.parameters(), 0.1))
        source, target = (self.trained(2), without) if saved else (without, self.trained(2))
        counters = (target.updates, target.skipped, target.samples)
        words = "a scheduler, and this TrainStep has none" if saved else "no scheduler, and this TrainStep has one"
        with pytest.raises(OptionError, match=rf"the saved state has {words}: build it like the saved one"):
            target.load_state_dict(source.state_dict())
        assert (target.updates, target.skipped, target.samples) == counters

    @pytest.mark.parametrize("missing", ["updates", "skipped", "samples", "scheduler", "accumulator"])
    def test_what_is_no_state_is_refused_with_what_is_missing(self, missing):
        step = self.trained(1)
        state = {name: value for name, value in step.state_dict().items() if name != missing}
        with pytest.raises(OptionError, match=missing):
            step.load_state_dict(state)

    def test_counters_come_back(self):
        step = self.trained(1)
        step.load_state_dict({**step.state_dict(), "updates": 5, "skipped": 6, "samples": 7})
        assert (step.updates, step.skipped, step.samples) == (5, 6, 7)


class Sam(torch.optim.Optimizer):
    """As the usual implementations have it."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def first_step(self, zero_grad=False):
        raise NotImplementedError

    def second_step(self, zero_grad=False):
        raise NotImplementedError

    def step(self, closure=None):
        raise NotImplementedError


class NeedsClosure(torch.optim.SGD):
    def step(self, closure):
        raise NotImplementedError


class TestRefused:
    @pytest.mark.parametrize("make_optimizer", [torch.optim.LBFGS, NeedsClosure])
    def test_optimizers_that_need_a_closure_with_the_lines_to_write(self, make_optimizer):
        model, _ = make()
        with pytest.raises(TrainStepError, match=make_optimizer.__name__) as caught:
            step_for(model, make_optimizer(model.parameters()))
        for line in (
            "def closure():",
            "optimizer.zero_grad()",
            "return accumulator.backward(batch).loss",
            "optimizer.step(closure)",
        ):
            assert line in str(caught.value)
        assert isinstance(caught.value, TypeError)

    def test_a_closure_is_seen_behind_a_scheduler_too(self):
        model, _ = make()
        optimizer = torch.optim.LBFGS(model.parameters())
        with pytest.raises(TrainStepError, match="LBFGS"):
            step_for(model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))

    def test_sharpness_aware_optimizers_with_the_lines_to_write(self):
        model, _ = make()
        with pytest.raises(TrainStepError, match="Sam makes two gradients per update") as caught:
            step_for(model, Sam(model.parameters()))
        assert str(caught.value).count("accumulator.backward(batch)") == 2
        assert "first_step(zero_grad=True)" in str(caught.value) and "second_step(zero_grad=True)" in str(caught.value)

    def test_a_scheduler_that_needs_a_metric_with_the_line_to_write(self):
        model, _ = make()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with pytest.raises(TrainStepError, match="ReduceLROnPlateau") as caught:
            step_for(model, optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
        assert "scheduler.step(validation_loss)" in str(caught.value)

    @pytest.mark.parametrize("optimizer", [None, "SGD", torch.optim.SGD])
    def test_what_is_no_optimizer(self, optimizer):
        model, _ = make()
        with pytest.raises(gradfold.GradfoldError):
            step_for(model, optimizer)

    def test_what_is_no_accumulator(self):
        model, _ = make()
        with pytest.raises(gradfold.GradfoldError, match="Accumulator"):
            gradfold.TrainStep(model, torch.optim.SGD(model.parameters(), 0.1))

    def test_what_is_no_scheduler(self):
        """Such as a limit for the gradient's norm, given by position."""
        model, _ = make()
        with pytest.raises(gradfold.GradfoldError):
            step_for(model, torch.optim.SGD(model.parameters(), 0.1), 1.0)

    def test_an_optimizer_of_another_model(self):
        model, _ = make()
        with pytest.raises(gradfold.GradfoldError, match="would train nothing"):
            step_for(model, torch.optim.SGD(copy.deepcopy(model).parameters(), 0.1))

    def test_wrapped_optimizers_and_schedulers_are_looked_into(self):
        model, _ = make()

        class Wrapped:
            def __init__(self, inner, **attributes):
                vars(self).update(attributes, **{type(self).kind: inner})

            def step(self, *args):
                raise NotImplementedError

        class Optimizer(Wrapped):
            kind = "optimizer"

        class Schedule(Wrapped):
            kind = "scheduler"

        lbfgs, sgd = torch.optim.LBFGS(model.parameters()), torch.optim.SGD(model.parameters(), 0.1)
        with pytest.raises(TrainStepError, match="LBFGS"):
            step_for(model, Optimizer(lbfgs, param_groups=lbfgs.param_groups))
        with pytest.raises(TrainStepError, match="ReduceLROnPlateau"):
            step_for(model, sgd, Schedule(torch.optim.lr_scheduler.ReduceLROnPlateau(sgd)))


@pytest.mark.parametrize("make_optimizer", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.Adafactor])
def test_optimizers_with_an_optional_closure_are_driven(make_optimizer):
    model, batch = make()
    step = step_for(model, make_optimizer(model.parameters()))
    losses = [step(batch).loss.item() for _ in range(5)]
    assert losses[-1] < losses[0]


def test_the_written_lines_for_a_closure_train_as_the_full_batch():
    model, batch = make()
    batch = (batch[0] - 1e4, batch[1])
    twin = copy.deepcopy(model)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2)
    optimizer, other = (torch.optim.LBFGS(m.parameters(), max_iter=4) for m in (model, twin))

    def closure():
        optimizer.zero_grad()
        return accumulator.backward(batch).loss

    def full():
        other.zero_grad()
        loss = loss_fn(twin, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    other.step(full)
    for one, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-8, atol=1e-10)


class Masters(torch.optim.AdamW):
    """Steps float32 copies of its own."""

    def __init__(self, low, **options):
        self.low = list(low)
        self.high = [one.detach().float().clone() for one in self.low]
        super().__init__(self.high, **options)

    @torch.no_grad()
    def step(self, closure=None):
        for low, high in zip(self.low, self.high, strict=True):
            high.grad = low.grad.float()
        super().step()
        for low, high in zip(self.low, self.high, strict=True):
            low.copy_(high)


class Wrapper:
    """As frameworks wrap an optimizer."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.optimizer.step()


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, Wrapper])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_an_optimizer_may_hold_master_weights(wrap, max_grad_norm):
    model, batch = nn.Linear(3, 1).double(), (torch.randn(8, 3).double(), torch.randn(8, 1).double())
    twin = copy.deepcopy(model)
    step = step_for(model, wrap(Masters(model.parameters(), lr=0.1)), max_grad_norm=max_grad_norm)
    optimizer = Masters(twin.parameters(), lr=0.1)
    for _ in range(3):
        result = step(batch)
        twin.zero_grad()
        loss_fn(twin, batch).backward()
        if max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
            torch.testing.assert_close(result.grad_norm, norm)
        optimizer.step()
    assert relative_error(model.state_dict(), twin.state_dict()) <= 1e-6


def test_an_optimizer_of_another_model_and_masters_with_a_scaler_are_refused():
    model = nn.Linear(3, 1)
    with pytest.raises(TrainStepError, match="no parameter of the optimizer belongs"):
        step_for(model, Masters(copy.deepcopy(model).parameters()))
    accumulator = gradfold.Accumulator(model, loss_fn, precision="fp16")
    with pytest.raises(TrainStepError, match="loss scaler is not supported"):
        gradfold.TrainStep(accumulator, Masters(model.parameters()))


class Timm:
    """A schedule that is told the epoch."""

    def step(self, epoch, metric=None):
        raise NotImplementedError

    def state_dict(self):
        return {}

    load_state_dict = state_dict


class PerUpdate(Timm):
    def step(self, *, num_updates):
        raise NotImplementedError


@pytest.mark.parametrize("schedule", [Timm(), PerUpdate()])
def test_schedules_that_need_an_argument_are_refused_before_an_update(schedule):
    model, _ = make()
    with pytest.raises(TrainStepError, match=rf"{type(schedule).__name__}.step cannot be called as step\(\)"):
        step_for(model, torch.optim.SGD(model.parameters(), 0.1), schedule)


def test_a_scheduler_that_cannot_be_stepped_is_refused():
    model, _ = make()
    with pytest.raises(TrainStepError, match="expected a learning-rate scheduler"):
        step_for(model, torch.optim.SGD(model.parameters(), 0.1), object())
