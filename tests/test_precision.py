"""Precision: autocast and loss scaling as in plain torch, and what gradients of small dtypes are summed in."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from reference import gradients, relative_error
from torch import nn

import gradfold
from gradfold.errors import NotDecomposableError, OptionError

F = nn.functional
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BY_NAME = pytest.mark.parametrize("name", DTYPES)


def net(dtype=torch.float32):
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def rows(num_rows=7, dtype=torch.float32):
    return torch.randn(num_rows, 4).to(dtype), torch.randn(num_rows, 3)


def squares(model, batch):
    return F.mse_loss(model(batch[0]).float(), batch[1])


def cut(batch, size):
    """Micro-batches as gradfold cuts them, each with its share of the rows."""
    num_rows = len(batch[0])
    parts = [torch.tensor_split(one, math.ceil(num_rows / size)) for one in batch]
    return [(part, len(part[0]) / num_rows) for part in zip(*parts, strict=True)]


def plain_window(model, batch, size=2, dtype=None, scaler=None, loss_fn=squares):
    """The loop that one writes by hand; gives the loss of the batch."""
    total = 0.0
    for part, share in cut(batch, size):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = loss_fn(model, part)
        weighed = loss * share
        (weighed if scaler is None else scaler.scale(weighed)).backward()
        total += weighed.item()
    return total


def accumulator_for(model, precision=None, loss_fn=squares, size=2, **options):
    return gradfold.Accumulator(
        model, loss_fn, micro_batch_size=size, precision=precision, **({"self_check": False} | options)
    )


def scaler_of(scale=65536.0, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def assert_equal(found, expected):
    """Bitwise, dtypes included; NaN is equal to NaN."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def dtypes(model):
    return {None if one.grad is None else one.grad.dtype for one in model.parameters()}


def grad_dtypes(model):
    return {one.grad_dtype for one in model.parameters()}


class TestAutocast:
    @BY_NAME
    def test_the_gradient_is_that_of_the_plain_loop_bitwise(self, name):
        model, batch = net(), rows()
        twin = copy.deepcopy(model)
        result = accumulator_for(model, name).backward(batch)
        loss = plain_window(twin, batch, dtype=DTYPES[name], scaler=scaler_of() if name == "fp16" else None)
        assert_equal(gradients(model), gradients(twin))
        assert result.loss.item() == pytest.approx(loss, rel=1e-6) and result.loss.dtype == torch.float32

    @BY_NAME
    def test_the_gradient_is_near_that_of_the_full_batch_and_not_the_same(self, name):
        model, batch = net(), rows(32)
        twin = copy.deepcopy(model)
        scaler = accumulator_for(model, gradfold.Precision(DTYPES[name], scaler_of(1024.0))).grad_scaler
        accumulator_for(model, gradfold.Precision(DTYPES[name], scaler)).backward(batch)
        squares(twin, batch).backward()
        found = {name: gradient / 1024 for name, gradient in gradients(model).items()}
        assert 1e-5 < relative_error(found, gradients(twin)) < 2e-2

    @BY_NAME
    def test_forward_and_loss_run_under_it_and_nothing_else_does(self, name):
        seen = {}

        def loss_fn(model, batch):
            seen["batch"] = [one.dtype for one in batch]
            seen["on"] = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            output = model(batch[0])
            seen["output"] = output.dtype
            output.register_hook(lambda _: seen.update(backward=torch.is_autocast_enabled("cpu")))
            return F.mse_loss(output, batch[1])

        model, batch = net(), rows()
        before = copy.deepcopy(model.state_dict()), [one.clone() for one in batch]
        accumulator_for(model, name, loss_fn).backward(batch)
        assert seen["on"] == (True, DTYPES[name]) and seen["output"] == DTYPES[name]
        assert seen["backward"] is False and not torch.is_autocast_enabled("cpu")
        assert seen["batch"] == [torch.float32] * 2
        assert dtypes(model) == {torch.float32}
        assert_equal(model.state_dict(), before[0])
        assert all(map(torch.equal, batch, before[1]))

    def test_it_ends_where_the_loss_fails(self):
        def loss_fn(model, batch):
            raise LookupError

        with pytest.raises(LookupError):
            accumulator_for(net(), "bf16", loss_fn).backward(rows())
        assert not torch.is_autocast_enabled("cpu")

    @pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
    @BY_NAME
    def test_none_leaves_the_user_s_own_alone(self, name, inside):
        def loss_fn(model, batch):
            with torch.autocast("cpu", DTYPES[name]):
                return squares(model, batch)

        model, batch = net(), rows()
        twin = copy.deepcopy(model)
        if inside:
            accumulator_for(model, None, loss_fn).backward(batch)
        else:
            with torch.autocast("cpu", DTYPES[name]):
                accumulator_for(model).backward(batch)
        plain_window(twin, batch, dtype=DTYPES[name])
        assert_equal(gradients(model), gradients(twin))

    def test_none_runs_none(self):
        seen = []

        def loss_fn(model, batch):
            seen.append(torch.is_autocast_enabled("cpu"))
            return squares(model, batch)

        accumulator = accumulator_for(net(), None, loss_fn)
        accumulator.backward(rows())
        assert not any(seen) and accumulator.grad_scaler is None

    def test_a_checkpointed_model(self):
        model, batch = net(), rows()
        twin = copy.deepcopy(model)

        def loss_fn(model, batch):
            return squares(lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), batch)

        accumulator_for(model, "bf16", loss_fn).backward(batch)
        plain_window(twin, batch, dtype=torch.bfloat16)
        assert_equal(gradients(model), gradients(twin))


class TestOptions:
    def test_the_names_stand_for_their_parts(self):
        model = net()
        assert accumulator_for(model).precision == gradfold.Precision()
        assert accumulator_for(model, "bf16").precision == gradfold.Precision(compute=torch.bfloat16)
        fp16 = accumulator_for(model, "fp16")
        assert fp16.precision.compute == torch.float16 and isinstance(fp16.grad_scaler, torch.amp.GradScaler)
        assert fp16.grad_scaler.is_enabled() and fp16.grad_scaler.get_scale() == 65536

    def test_a_value_is_taken_as_it_is(self):
        own = gradfold.Precision(torch.float16, scaler_of(8.0), torch.float64, True)
        accumulator = accumulator_for(net(), own)
        assert accumulator.precision is own and accumulator.grad_scaler is own.grad_scaler

    @pytest.mark.parametrize(
        ("option", "words"),
        [
            ("half", ["'half'", '"bf16", "fp16" or a gradfold.Precision']),
            (torch.bfloat16, ["torch.bfloat16", '"bf16"']),
            (True, ["True", "None"]),
        ],
    )
    def test_what_is_no_precision_is_refused(self, option, words):
        with pytest.raises(OptionError) as caught:
            accumulator_for(net(), option)
        assert all(word in str(caught.value) for word in words)

    @pytest.mark.parametrize(
        ("parts", "words"),
        [
            ({"compute": torch.float64}, ["compute=torch.float64", "torch.bfloat16 or torch.float16"]),
            ({"compute": torch.int8}, ["compute=torch.int8", "floating point"]),
            ({"compute": "bf16"}, ["compute='bf16'", "torch.bfloat16"]),
            ({"accumulate_dtype": torch.int32}, ["accumulate_dtype=torch.int32", "floating point"]),
            ({"accumulate_dtype": "float32"}, ["accumulate_dtype='float32'"]),
            ({"grad_scaler": True}, ["grad_scaler is a bool", "torch.amp.GradScaler(device)"]),
            ({"accumulate_dtype": None, "keep_accumulate_dtype": True}, ["keep_accumulate_dtype", "torch.float32"]),
        ],
    )
    def test_parts_that_cannot_work_are_refused(self, parts, words):
        with pytest.raises(OptionError) as caught:
            gradfold.Precision(**parts)
        assert all(word in str(caught.value) for word in words)

    def test_a_scaler_beside_a_framework_s_backward_is_refused(self):
        with pytest.raises(OptionError, match=r"scales the loss by itself.*Leave the scaler out"):
            accumulator_for(net(), "fp16", backward=lambda loss, gradient: loss.backward(gradient=gradient))

    def test_autocast_beside_a_framework_s_backward_is_taken(self):
        model, batch = net(), rows()
        twin = copy.deepcopy(model)
        own = accumulator_for(model, "bf16", backward=lambda loss, gradient: loss.backward(gradient=gradient))
        own.backward(batch)
        plain_window(twin, batch, dtype=torch.bfloat16)
        assert_equal(gradients(model), gradients(twin))

    def test_a_scaler_over_float16_parameters_is_refused_as_torch_would_but_before_the_work(self):
        model = net(torch.float16)
        with pytest.raises(OptionError, match=r"0\.weight is float16.*model\.float\(\).*keep_accumulate_dtype=True"):
            accumulator_for(model, "fp16")
        accumulator_for(model, gradfold.Precision(grad_scaler=torch.amp.GradScaler("cpu", enabled=False)))

        class Other(torch.amp.GradScaler):
            """One that takes them, as those for shards do."""

        accumulator_for(model, gradfold.Precision(grad_scaler=Other("cpu")))
        accumulator_for(model.requires_grad_(False), "fp16")  # a frozen part


class Plain:
    """The loop of the AMP recipe around one model, in plain torch: what TrainStep must equal."""

    def __init__(self, model, optimizer, schedule, scaler, dtype, limit):
        self.model, self.optimizer, self.schedule, self.scaler = model, optimizer, schedule, scaler
        self.dtype, self.limit, self.skipped = dtype, limit, 0

    def __call__(self, batch):
        self.optimizer.zero_grad()
        plain_window(self.model, batch, dtype=self.dtype, scaler=self.scaler)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        is_skipped = self.scaler.get_scale() < before
        self.skipped += is_skipped
        if not is_skipped:
            self.schedule.step()
        return norm


def trained(scale, limit=0.5, make_optimizer=torch.optim.AdamW, model=None, **options):
    """A TrainStep in float16 and its reference, from the same start."""
    model = net() if model is None else model
    models = model, copy.deepcopy(model)
    optimizers = [make_optimizer(one.parameters(), 0.05) for one in models]
    schedules = [torch.optim.lr_scheduler.StepLR(one, 1, 0.9) for one in optimizers]
    scalers = [scaler_of(scale, **options) for _ in models]
    accumulator = accumulator_for(models[0], gradfold.Precision(torch.float16, scalers[0]))
    step = gradfold.TrainStep(accumulator, optimizers[0], schedules[0], max_grad_norm=limit)
    return step, Plain(models[1], optimizers[1], schedules[1], scalers[1], torch.float16, limit)


# Hooks of an optimizer and schedule warn of a schedule that ticks before the first step, which is none of ours.
class TestTrainStep:
    @pytest.mark.parametrize("scale", [65536.0, 2.0**40], ids=["usual", "overflowing"])
    @pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD])
    def test_is_the_recipe_of_plain_torch_bitwise(self, scale, make_optimizer):
        step, plain = trained(scale, make_optimizer=make_optimizer, growth_interval=3)
        scales, skipped = [], 0
        start = copy.deepcopy(step.accumulator.model.state_dict())
        for num_rows in [7, 4, 1, 5, 6] * 10:
            batch = rows(num_rows)
            result, norm = step(batch), plain(batch)
            skipped += not result.applied
            assert_equal(gradients(step.accumulator.model), gradients(plain.model))
            assert_equal(dict(step.accumulator.model.named_parameters()), dict(plain.model.named_parameters()))
            assert torch.equal(result.grad_norm, norm) or not (result.applied or norm.isfinite())
            assert step.accumulator.grad_scaler.get_scale() == plain.scaler.get_scale()
            assert step.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
            assert (step.skipped, step.updates) == (plain.skipped, step.updates) and step.skipped == skipped
            if not step.updates:
                assert_equal(step.accumulator.model.state_dict(), start)
                assert not step.optimizer.state
            scales.append(plain.scaler.get_scale())
        assert step.scheduler.last_epoch == step.updates == 50 - skipped
        assert max(scales) > scales[0] or skipped > 10  # the scale did grow, or fall
        assert (skipped > 10) == (scale > 65536)

    def test_a_scale_that_is_too_large_backs_off_and_then_it_trains(self):
        step, _ = trained(2.0**40, limit=None)
        batch = rows(8)
        results = [step(batch) for _ in range(60)]
        applied = [one.applied for one in results]
        first = applied.index(True)
        assert first > 5 and not any(applied[:first])
        assert step.accumulator.grad_scaler.get_scale() <= 2.0 ** (40 - first)
        assert results[-1].loss < 0.7 * results[0].loss
        assert all(one.loss.isfinite() for one in results)  # the scale is in the seed alone

    def test_what_is_clipped_is_the_unscaled_gradient_of_the_whole_batch(self):
        step, _ = trained(65536.0, limit=1e-3, make_optimizer=torch.optim.SGD)
        twin, batch = copy.deepcopy(step.accumulator.model), rows()
        result = step(batch)
        squares(twin, batch).backward()
        expected = nn.utils.get_total_norm([one.grad for one in twin.parameters()])
        found = nn.utils.get_total_norm([one.grad for one in step.accumulator.model.parameters()])
        assert result.grad_norm.item() == pytest.approx(expected.item(), rel=1e-2) and found.item() < 1.001e-3

    def test_a_scale_that_has_fallen_to_nothing_applies_nothing(self):
        """A model that is NaN: nothing is applied, however often the scale is halved."""
        step, _ = trained(2.0**-148, limit=None)
        x, y = rows()
        assert [step((x * math.nan, y)).applied for _ in range(5)] == [False] * 5
        assert step.accumulator.grad_scaler.get_scale() == 0
        assert (step.updates, step.skipped, step.scheduler.last_epoch) == (0, 5, 0)

    def test_fused_optimizers_take_part(self):
        step, plain = trained(2.0**40, make_optimizer=lambda one, rate: torch.optim.AdamW(one, rate, fused=True))
        batch = rows()
        for _ in range(40):
            step(batch)
            plain(batch)
        assert_equal(dict(step.accumulator.model.named_parameters()), dict(plain.model.named_parameters()))
        assert step.skipped == plain.skipped > 5 and step.updates == 40 - plain.skipped

    def test_sparse_gradients(self):
        model = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Linear(3, 1))
        twin, ids = copy.deepcopy(model), torch.randint(0, 4, (11,))

        def loss_fn(model, batch):
            return model(batch).float().square().mean()

        accumulator = accumulator_for(model, "fp16", loss_fn)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        assert gradfold.TrainStep(accumulator, optimizer, max_grad_norm=math.inf)(ids).applied
        loss_fn(twin, ids).backward()
        assert relative_error(gradients(model), gradients(twin)) < 1e-2

    def test_bfloat16_needs_no_scaler(self):
        model, batch = net(), rows()
        twin = copy.deepcopy(model)
        optimizers = [torch.optim.AdamW(one.parameters(), 0.05) for one in (model, twin)]
        step = gradfold.TrainStep(accumulator_for(model, "bf16"), optimizers[0])
        for _ in range(3):
            assert step(batch).applied
            optimizers[1].zero_grad()
            plain_window(twin, batch, dtype=torch.bfloat16)
            optimizers[1].step()
        assert_equal(dict(model.named_parameters()), dict(twin.named_parameters()))

    def test_a_scaler_that_is_off_changes_nothing(self):
        model, batch = net(), rows()
        twin = copy.deepcopy(model)
        off = gradfold.Precision(grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
        step = gradfold.TrainStep(accumulator_for(model, off), torch.optim.SGD(model.parameters(), 0.1))
        assert step(batch).applied and step.updates == 1
        plain_window(twin, batch)
        assert_equal(gradients(model), gradients(twin))
        with pytest.raises(gradfold.NonFiniteLossError):
            step((batch[0] * math.nan, batch[1]))


class TestScaler:
    def test_a_loop_of_one_s_own_with_the_usual_calls(self):
        model = net()
        twin = copy.deepcopy(model)
        accumulator = accumulator_for(model, gradfold.Precision(torch.float16, scaler_of(2.0**30)))
        scalers = accumulator.grad_scaler, scaler_of(2.0**30)
        optimizers = [torch.optim.AdamW(one.parameters(), 0.05) for one in (model, twin)]
        for _ in range(30):
            batch = rows()
            for one in optimizers:
                one.zero_grad()
            accumulator.backward(batch)
            plain_window(twin, batch, dtype=torch.float16, scaler=scalers[1])
            for own, optimizer, scaler in zip((model, twin), optimizers, scalers, strict=True):
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(own.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
            assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_equal(dict(model.named_parameters()), dict(twin.named_parameters()))
        assert scalers[0].get_scale() < 2.0**30 and optimizers[0].state

    def test_gradients_found_and_new_are_both_scaled(self):
        model, batch = net(), rows()
        twin = copy.deepcopy(model)
        accumulator = accumulator_for(model, gradfold.Precision(torch.float16, scaler_of(1024.0)))
        for _ in range(2):
            accumulator.backward(batch)
        for _ in range(2):
            plain_window(twin, batch, dtype=torch.float16, scaler=scaler_of(1024.0))
        assert relative_error(gradients(model), gradients(twin)) < 1e-6

    def test_it_scales_every_term_of_a_loss_and_micro_batches_that_weigh_nothing_are_left_out(self):
        """With a power of two as scale, and without autocast, scaled gradients are the others times the scale."""

        def loss_fn(model, batch):
            x, y, counts = batch
            output = model(x)
            # 0 / 0 in micro-batches that count nothing
            first = ((output - y).square().mean(1) * counts).sum() / counts.sum()
            return {"counted": first, "size": output.square().mean()}, {"rows": output[:, 0]}

        weight = {"counted": lambda batch: batch[2].sum(), "size": "samples", "rows": "samples"}
        batch = (*rows(6), torch.tensor([1.0, 3.0, 0.0, 0.0, 2.0, 1.0]))
        model = net()
        twin = copy.deepcopy(model)
        scaled = accumulator_for(model, gradfold.Precision(grad_scaler=scaler_of(4096.0)), loss_fn, weight=weight)
        plain = accumulator_for(twin, None, loss_fn, weight=weight)
        results = scaled.backward(batch), plain.backward(batch)
        assert_equal(gradients(model), {name: 4096 * one for name, one in gradients(twin).items()})
        assert results[0].loss == results[1].loss and results[0].weight == results[1].weight
        assert torch.equal(results[0].metrics["rows"], results[1].metrics["rows"])

    def test_float64_is_scaled_in_float64(self):
        model = net(torch.float64)
        twin, batch = copy.deepcopy(model), [one.double() for one in rows()]

        def loss_fn(model, batch):
            return F.mse_loss(model(batch[0]), batch[1])

        accumulator_for(model, gradfold.Precision(grad_scaler=scaler_of(4096.0)), loss_fn).backward(batch)
        loss_fn(twin, batch).backward()
        found = {name: gradient / 4096 for name, gradient in gradients(model).items()}
        assert relative_error(found, gradients(twin)) < 1e-12

    def test_a_loss_in_float16_overflows_until_the_scale_fits(self):
        model = net()
        accumulator = accumulator_for(model, "fp16", lambda model, batch: model(batch[0]).square().mean(), size=8)
        step = gradfold.TrainStep(accumulator, torch.optim.SGD(model.parameters(), 0.01))
        applied = [step(rows(8)).applied for _ in range(8)]
        assert applied[0] is False and applied[-1] is True  # 65536 is infinite in float16
        assert accumulator.grad_scaler.get_scale() < 65536

    @pytest.mark.parametrize("on_non_finite", ["raise", "skip_update", "skip_micro_batch"])
    @pytest.mark.parametrize("where", ["loss", "gradient"])
    def test_what_is_not_finite_is_left_to_it(self, on_non_finite, where):
        model, batch = net(), rows()
        batch[0][3] = math.inf if where == "loss" else 0.0

        def loss_fn(model, batch):
            loss = squares(model, batch)
            at_zero = (model[0].weight @ batch[0].mT).float().square().sum().sqrt()
            return loss if where == "loss" else loss + at_zero

        accumulator = accumulator_for(model, "fp16", loss_fn, size=1, on_non_finite=on_non_finite)
        step = gradfold.TrainStep(accumulator, torch.optim.SGD(model.parameters(), 0.1))
        before = copy.deepcopy(model.state_dict())
        result = step(batch)
        assert not result.applied and not result.recoveries and step.skipped == 1
        assert accumulator.grad_scaler.get_scale() == 32768
        assert_equal(model.state_dict(), before)
        assert result.num_micro_batches == 7 and result.loss.isfinite().item() == (where == "gradient")

    @pytest.mark.filterwarnings("ignore:weight= is 0")
    def test_a_window_that_weighs_nothing_does_not_move_it(self):
        model = net()
        accumulator = accumulator_for(model, "fp16", weight=lambda batch: 0)
        step = gradfold.TrainStep(accumulator, torch.optim.SGD(model.parameters(), 0.1))
        assert not step(rows()).applied and step.skipped == 1
        assert accumulator.grad_scaler.state_dict() == scaler_of().state_dict()

    def test_a_parameter_that_another_optimizer_holds_is_left_scaled(self):
        """As in plain torch, where each optimizer unscales its own."""
        model, batch = net(), rows()
        accumulator = accumulator_for(model, gradfold.Precision(torch.float16, scaler_of(1024.0)))
        accumulator.backward(batch)
        before = gradients(model)
        accumulator.grad_scaler.unscale_(torch.optim.SGD(model[0].parameters(), 0.1))
        assert torch.equal(model[0].weight.grad, before["0.weight"] / 1024)
        assert torch.equal(model[2].weight.grad, before["2.weight"])


class TestSeveralScalers:
    """Two losses into one `.grad`, where each accumulator may scale its own."""

    PLAIN = "holds a gradient without a loss scale, .*this Accumulator has its own"
    OTHER = "holds a gradient scaled by another loss scaler, .*this Accumulator has its own"
    SCALED = "holds a gradient scaled by another loss scaler, .*this Accumulator has none"

    @pytest.mark.parametrize(
        ("first", "second", "says"), [("fp16", "fp16", OTHER), ("fp16", "bf16", SCALED), (None, "fp16", PLAIN)]
    )
    def test_two_scales_in_one_sum_are_refused(self, first, second, says):
        model, batch = net(), rows()
        one, other = accumulator_for(model, first), accumulator_for(model, second)
        one.backward(batch)
        found = gradients(model)
        with pytest.raises(
            OptionError, match=rf"0.weight.grad {says}.*Share one loss scaler: .*pass precision=.*Zero"
        ) as caught:
            other.backward(batch)
        assert_equal(gradients(model), found)
        assert ("or call grad_scaler.unscale_(optimizer) before" in str(caught.value)) == (says is self.SCALED)

    def test_a_module_that_two_losses_share_is_enough(self):
        """A generator, whose penalty is scaled by itself; and the gradient was unscaled, which makes it no better."""
        shared = net()
        whole = nn.ModuleList([shared, nn.Linear(2, 2)])
        penalty = accumulator_for(shared, "fp16")
        penalty.backward(rows())
        penalty.grad_scaler.unscale_(torch.optim.SGD(shared.parameters(), 0.1))
        with pytest.raises(OptionError, match=rf"0.0.weight.grad {self.OTHER}"):
            accumulator_for(whole, "fp16", lambda model, batch: squares(model[0], batch)).backward(rows())

    def test_one_scaler_for_both_is_plain_torch(self):
        model, batches = net(), [rows(7), rows(5)]
        twin, scaler = copy.deepcopy(model), scaler_of(64.0)
        shared = gradfold.Precision(torch.float16, scaler)
        for batch in batches:
            accumulator_for(model, shared).backward(batch)
            plain_window(twin, batch, dtype=torch.float16, scaler=scaler_of(64.0))
        assert_equal(gradients(model), gradients(twin))

    def test_zeros_and_gradients_of_the_user_are_added_to(self):
        model, batch = net(), rows()
        accumulators = [accumulator_for(model, one) for one in ("fp16", None, "fp16", "fp16")]
        for accumulator, zero in zip(accumulators, ("zero_", "set", "data", ""), strict=True):
            accumulator.backward(batch)
            for parameter in model.parameters():
                if zero == "data":
                    parameter.grad.data.zero_()
                elif zero:
                    parameter.grad = torch.zeros_like(parameter) if zero == "set" else parameter.grad.zero_()
        scaler = accumulators[-1].grad_scaler
        plain_window(model, batch, dtype=torch.float16, scaler=scaler)  # which may well be by this scaler
        accumulators[-1].backward(batch)
        scaler.unscale_(torch.optim.SGD(model.parameters(), 0.1))
        found, twin = gradients(model), copy.deepcopy(model)
        twin.zero_grad()
        for _ in range(3):
            plain_window(twin, batch)
        assert relative_error(found, gradients(twin)) < 1e-2

    def test_what_was_unscaled_is_added_to_without_a_scaler(self):
        model, batch = net(), rows()
        twin, scaled = copy.deepcopy(model), accumulator_for(model, "fp16")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaled.backward(batch)
        scaled.grad_scaler.unscale_(optimizer)
        accumulator_for(model).backward(batch)
        for _ in range(2):
            plain_window(twin, batch)
        assert relative_error(gradients(model), gradients(twin)) < 1e-2
        scaled.grad_scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=False)
        accumulator_for(model).backward(batch)

    def test_with_the_backward_of_a_framework_nothing_is_known(self):
        model, batch = net(), rows()
        accumulator_for(model, backward=lambda loss, gradient: loss.backward(gradient=gradient)).backward(batch)
        accumulator_for(model, "fp16").backward(batch)

    def test_a_disabled_scaler_is_none(self):
        model, batch = net(), rows()
        disabled = gradfold.Precision(grad_scaler=torch.amp.GradScaler("cpu", enabled=False))
        accumulator_for(model).backward(batch)
        accumulator_for(model, disabled).backward(batch)


class TestState:
    def run(self, num_batches, seed=1, scale=2.0**28):
        torch.manual_seed(seed)
        step, _ = trained(scale, growth_interval=4)
        for number in range(num_batches):
            step(self.batch(number))
        return step

    def batch(self, number):
        torch.manual_seed(100 + number)
        return rows(3 + number % 4)

    def test_goes_round_through_a_file_and_the_run_goes_on_bitwise(self, tmp_path):
        whole, first = self.run(30), self.run(17)
        torch.save(
            [first.state_dict(), first.accumulator.model.state_dict(), first.optimizer.state_dict()],
            tmp_path / "run.pt",
        )
        states = torch.load(tmp_path / "run.pt", weights_only=True)
        resumed = self.run(0, seed=9, scale=2.0)
        resumed.load_state_dict(states[0])
        resumed.accumulator.model.load_state_dict(states[1])
        resumed.optimizer.load_state_dict(states[2])
        for number in range(17, 30):
            resumed(self.batch(number))
        assert_equal(
            dict(resumed.accumulator.model.named_parameters()), dict(whole.accumulator.model.named_parameters())
        )
        assert resumed.state_dict() == whole.state_dict()
        assert resumed.skipped > 3 and resumed.updates > 3

    @pytest.mark.parametrize("is_saved", [True, False])
    def test_with_and_without_a_scaler_do_not_fit_and_nothing_is_half_loaded(self, is_saved):
        model = net()
        plain = gradfold.TrainStep(accumulator_for(model), torch.optim.SGD(model.parameters(), 0.1))
        plain.scheduler = torch.optim.lr_scheduler.StepLR(plain.optimizer, 1)
        source, target = (self.run(20), plain) if is_saved else (plain, self.run(20))
        before = copy.deepcopy(target.state_dict())
        words = "a loss scaler, and this Accumulator has none" if is_saved else "no loss scaler, .* has one"
        with pytest.raises(OptionError, match=rf"the saved state has {words}: pass the precision="):
            target.load_state_dict(source.state_dict())
        assert target.state_dict() == before


def weighed(model, batch):
    """A mean in float32 of a model in bfloat16, so that seeds are not rounded."""
    return (model(batch[0]).float() * batch[1]).mean()


def micro_gradients(model, batch, num_parts, loss_fn=weighed):
    """What each micro-batch adds, in plain torch and the parameters' own dtype, by name."""
    found = []
    for part, share in cut(batch, len(batch[0]) // num_parts):
        twin = copy.deepcopy(model)
        (loss_fn(twin, part) * share).backward()
        found.append({name: one.grad for name, one in twin.named_parameters()})
    return found


class TestSums:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_over_128_micro_batches_they_are_those_of_float64(self, dtype):
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
        batch = torch.randn(256, 16).to(dtype), 1 + torch.rand(256, 4)
        parts = micro_gradients(model, batch, 128)
        expected = {name: sum(one[name].double() for one in parts) for name in parts[0]}
        kept, rounded, plain = (copy.deepcopy(model) for _ in range(3))
        keep = gradfold.Precision(keep_accumulate_dtype=True)
        accumulator_for(kept, keep, weighed).backward(batch)
        accumulator_for(rounded, None, weighed).backward(batch)
        accumulator_for(plain, gradfold.Precision(accumulate_dtype=None), weighed).backward(batch)
        assert dtypes(kept) == {torch.float32} and dtypes(rounded) == dtypes(plain) == {dtype}
        assert relative_error(as_float64(kept), expected) <= 1e-7
        # Handed over with exactly one rounding.
        assert_equal(gradients(rounded), {name: one.to(dtype) for name, one in gradients(kept).items()})
        assert 1e-5 < relative_error(as_float64(rounded), expected) < 3e-3
        if dtype == torch.bfloat16:
            assert 4e-3 < relative_error(as_float64(plain), expected) < 3e-2
        # What opts out is the plain loop.
        loop = copy.deepcopy(model)
        plain_window(loop, batch, 2, loss_fn=weighed)
        assert_equal(gradients(plain), gradients(loop))

    def test_float64_sums_of_float32_gradients(self):
        model, batch = net(), rows(64)
        parts = micro_gradients(model, batch, 32, squares)
        expected = {name: sum(one[name].double() for one in parts) for name in parts[0]}
        accumulator_for(model, gradfold.Precision(None, None, torch.float64, True)).backward(batch)
        assert_equal(gradients(model), expected)

    @pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_adamw_takes_what_is_handed_over(self, options, dtype):
        model = net(dtype)
        optimizer = torch.optim.AdamW(model.parameters(), 0.02, eps=1e-4, **options)
        step = gradfold.TrainStep(accumulator_for(model), optimizer, max_grad_norm=1.0)
        batch = rows(8, dtype)
        losses = [step(batch).loss.item() for _ in range(20)]
        assert losses[-1] < 0.8 * losses[0]

    @pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
    def test_adamw_refuses_what_is_kept_which_is_why_it_is_handed_over_rounded(self, options):
        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        accumulator_for(model, gradfold.Precision(keep_accumulate_dtype=True)).backward(batch)
        with pytest.raises(RuntimeError, match="BFloat16"):
            torch.optim.AdamW(model.parameters(), **options).step()

    @pytest.mark.parametrize("foreach", [True, False])
    def test_sgd_takes_what_is_kept(self, foreach):
        model = net(torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, foreach=foreach)
        keep = gradfold.Precision(keep_accumulate_dtype=True)
        step = gradfold.TrainStep(accumulator_for(model, keep), optimizer, max_grad_norm=1.0)
        batch = rows(8, torch.bfloat16)
        losses = [step(batch).loss.item() for _ in range(20)]
        assert losses[-1] < 0.8 * losses[0] and dtypes(model) == {torch.float32}

    def test_float16_parameters_with_a_scaler_keep_theirs(self):
        model = net(torch.float16)
        keep = gradfold.Precision(None, scaler_of(1024.0), keep_accumulate_dtype=True)
        step = gradfold.TrainStep(accumulator_for(model, keep), torch.optim.SGD(model.parameters(), 0.1))
        batch = rows(8, torch.float16)
        losses = [step(batch).loss.item() for _ in range(20)]
        assert losses[-1] < 0.8 * losses[0] and step.updates == 20

    def test_after_the_window_the_fields_take_what_they_took(self):
        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        accumulator = accumulator_for(model)
        for _ in range(2):
            accumulator.backward(batch)
            assert grad_dtypes(model) == dtypes(model) == {torch.bfloat16}
            squares(model, batch).backward()  # adds to it
            model.zero_grad()

    @pytest.mark.parametrize("keep", [False, True])
    def test_gradients_found_are_added_to(self, keep):
        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        alone = copy.deepcopy(model)
        precision = gradfold.Precision(keep_accumulate_dtype=keep)
        accumulator_for(alone, precision).backward(batch)
        squares(model, batch).backward()
        tensors, found = [one.grad for one in model.parameters()], gradients(model)
        accumulator_for(model, precision).backward(batch)
        expected = {name: new + found[name] for name, new in gradients(alone).items()}
        assert_equal(gradients(model), expected)
        assert dtypes(model) == {torch.float32 if keep else torch.bfloat16}
        if not keep:
            assert all(one.grad is tensor for one, tensor in zip(model.parameters(), tensors, strict=True))

    def test_gradients_kept_from_the_window_before_are_added_to_in_float32(self):
        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        accumulator = accumulator_for(model, gradfold.Precision(keep_accumulate_dtype=True))
        accumulator.backward(batch)
        first, tensors = gradients(model), [one.grad for one in model.parameters()]
        accumulator.backward(batch)
        assert_equal(gradients(model), {name: 2 * one for name, one in first.items()})
        assert all(one.grad is tensor for one, tensor in zip(model.parameters(), tensors, strict=True))

    @pytest.mark.parametrize("keep", [False, True])
    def test_sparse_ones(self, keep):
        model = nn.Embedding(9, 3, sparse=True).to(torch.bfloat16)
        dense = nn.Embedding(9, 3).to(torch.bfloat16)
        dense.load_state_dict(model.state_dict())
        ids, precision = torch.randint(0, 4, (32,)), gradfold.Precision(keep_accumulate_dtype=keep)

        def loss_fn(model, batch):
            return model(batch).float().square().mean()

        for one in (model, dense):
            accumulator = accumulator_for(one, precision, loss_fn)
            accumulator.backward(ids)
        assert model.weight.grad.is_sparse and model.weight.grad.is_coalesced()
        assert relative_error(gradients(model), gradients(dense)) < (1e-6 if keep else 4e-3)
        assert dtypes(model) == {torch.float32 if keep else torch.bfloat16}
        accumulator_for(model, precision, loss_fn).backward(ids)
        assert relative_error(gradients(model), {"weight": 2 * gradients(dense)["weight"]}) < 8e-3

    def test_shared_frozen_unused_and_late_parameters(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.frozen, self.unused = (nn.Linear(4, 4, bias=False) for _ in range(3))
                self.second = nn.Linear(4, 4, bias=False)
                self.second.weight = self.first.weight
                self.frozen.requires_grad_(False)
                self.late = nn.LazyLinear(3, bias=False)

            def forward(self, x):
                return self.late(self.second(self.frozen(self.first(x)).tanh()))

        model, batch = Model().to(torch.bfloat16), rows(8, torch.bfloat16)
        accumulator = accumulator_for(model)
        accumulator.backward(batch)
        assert model.frozen.weight.grad is None and model.unused.weight.grad is None
        assert model.first.weight.grad.dtype == model.late.weight.grad.dtype == torch.bfloat16
        assert grad_dtypes(model) == {torch.bfloat16}
        model.zero_grad()
        accumulator.backward(batch)  # now that none is late
        keep = accumulator_for(copy.deepcopy(model), gradfold.Precision(keep_accumulate_dtype=True))
        keep.backward(batch)
        expected = {name: one.to(torch.bfloat16) for name, one in gradients(keep.model).items()}
        assert_equal(gradients(model), expected)

    def test_other_dtypes_are_untouched(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.half_one = nn.Parameter(torch.randn(4).to(torch.bfloat16))
                self.double_one = nn.Parameter(torch.randn(4).double())
                self.complex_one = nn.Parameter(torch.randn(4, dtype=torch.complex64))
                self.single_one = nn.Parameter(torch.randn(4))
                self.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)  # as quantized layers

        def loss_fn(model, batch):
            factor = model.half_one.double() * model.double_one * model.single_one * model.complex_one.abs()
            return (batch.double() * factor).mean()

        model, batch = Model(), torch.randn(8, 4)
        twin = copy.deepcopy(model)
        for _ in range(2):
            accumulator_for(model, gradfold.Precision(keep_accumulate_dtype=True), loss_fn).backward(batch)
        assert {name: one.grad.dtype for name, one in model.named_parameters() if one.requires_grad} == {
            "half_one": torch.float32,
            "double_one": torch.float64,
            "complex_one": torch.complex64,
            "single_one": torch.float32,
        }
        assert model.codes.grad is None and model.codes.grad_dtype == torch.int8
        loss_fn(twin, batch).backward()
        double = gradients(twin)["double_one"]
        assert relative_error({"double": model.double_one.grad}, {"double": 2 * double}) < 1e-12

    @pytest.mark.parametrize("own", [torch.float32, None])
    def test_a_grad_dtype_of_the_user_s_is_left_alone(self, own):
        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        model[0].weight.grad_dtype = own
        accumulator_for(model).backward(batch)
        assert model[0].weight.grad_dtype is own
        assert model[0].weight.grad.dtype == (own or torch.bfloat16)
        assert model[2].weight.grad.dtype == model[2].weight.grad_dtype == torch.bfloat16

    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("at", [0, 3])
    def test_a_window_that_fails_leaves_fields_and_dtypes_as_they_were(self, keep, at):
        calls = []

        def loss_fn(model, batch):
            calls.append(batch)
            if len(calls) == at + 1:
                raise KeyboardInterrupt
            return squares(model, batch)

        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        squares(model, batch).backward()
        tensors, before = [one.grad for one in model.parameters()], gradients(model)
        with pytest.raises(KeyboardInterrupt):
            accumulator_for(model, gradfold.Precision(keep_accumulate_dtype=keep), loss_fn).backward(batch)
        assert grad_dtypes(model) == {torch.bfloat16}
        assert all(one.grad is tensor for one, tensor in zip(model.parameters(), tensors, strict=True))
        assert_equal(gradients(model), before)

    def test_a_window_that_fails_leaves_what_was_kept_before(self):
        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        accumulator = accumulator_for(model, gradfold.Precision(keep_accumulate_dtype=True))
        accumulator.backward(batch)
        before = gradients(model)
        with pytest.raises(gradfold.NonFiniteLossError):
            accumulator.backward((batch[0] * math.nan, batch[1]))
        assert_equal(gradients(model), before)
        assert grad_dtypes(model) == {torch.float32}

    def test_a_window_that_is_skipped_leaves_the_dtypes_as_they_were(self):
        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        accumulator = accumulator_for(model, on_non_finite="skip_update")
        assert accumulator.backward((batch[0] * math.nan, batch[1])).is_skipped
        assert dtypes(model) == {None} and grad_dtypes(model) == {torch.bfloat16}
        accumulator.backward(batch)
        torch.optim.AdamW(model.parameters()).step()

    @pytest.mark.filterwarnings("ignore:weight= is 0")
    def test_windows_that_leave_out_micro_batches_or_weigh_nothing(self):
        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        bad = batch[0].clone(), batch[1]
        bad[0][3] = math.nan
        result = accumulator_for(model, on_non_finite="skip_micro_batch").backward(bad)
        assert result.recoveries and dtypes(model) == grad_dtypes(model) == {torch.bfloat16}
        model.zero_grad()
        assert accumulator_for(model, weight=lambda batch: 0).backward(batch).is_empty
        assert dtypes(model) == {None} and grad_dtypes(model) == {torch.bfloat16}

    def test_a_sum_that_the_parameters_dtype_cannot_hold_is_refused(self):
        model = nn.Linear(1, 1, bias=False).half()
        accumulator = accumulator_for(model, None, lambda model, batch: (model(batch).float() * 1e5).mean())
        with pytest.raises(gradfold.NonFiniteGradientError, match="their sum overflows"):
            accumulator.backward(torch.ones(8, 1).half())
        assert grad_dtypes(model) == {torch.float16}

    def test_a_copy_of_the_model_trains_on(self):
        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        for precision in (None, gradfold.Precision(keep_accumulate_dtype=True)):
            accumulator_for(model, precision).backward(batch)
            twin = copy.deepcopy(model)
            assert grad_dtypes(twin) == {torch.bfloat16}
            squares(twin, batch).backward()
            accumulator_for(twin).backward(batch)
            assert dtypes(twin) == {torch.bfloat16}

    def test_compiled_models(self):
        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        twin = copy.deepcopy(model)
        accumulator_for(torch.compile(model, backend="aot_eager")).backward(batch)
        accumulator_for(twin).backward(batch)
        assert relative_error(as_float64(model), as_float64(twin)) < 4e-3 and dtypes(model) == {torch.bfloat16}


def as_float64(model):
    return {name: gradient.double() for name, gradient in gradients(model).items()}


class TestGuard:
    """The self-check under autocast: it accuses no right set-up, and no wrong one is passed over."""

    def quietly(self, model, loss_fn, batch, **options):
        model.zero_grad()
        accumulator = gradfold.Accumulator(model, loss_fn, **({"micro_batch_size": 8} | options))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            accumulator.backward(batch)

    @BY_NAME
    @pytest.mark.parametrize("drop", [0.0, 0.3])
    def test_right_ones_are_not_accused(self, name, drop):
        for seed in range(12):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(drop), nn.Linear(16, 3))
            labels = torch.randint(0, 3, (24,)).masked_fill(torch.rand(24) < 0.4, -100)
            batch = torch.randn(24, 4), labels, torch.randn(24, 3)
            tokens = gradfold.token_count(1)

            def entropy(model, batch):
                return F.cross_entropy(model(batch[0]), batch[1])

            def terms(model, batch):
                return {"entropy": entropy(model, batch), "size": model(batch[0]).float().square().mean()}

            self.quietly(model, entropy, batch, weight=tokens, precision=name)
            self.quietly(model, terms, batch, weight={"entropy": tokens, "size": "samples"}, precision=name)
            self.quietly(model, lambda model, batch: squares(model, batch[::2]), batch, precision=name)

    @BY_NAME
    def test_a_wrong_weight_is_caught_and_the_right_one_named(self, name):
        labels = torch.full((16, 6), -100)
        for row in range(16):
            labels[row, : 1 if row % 8 > 1 else 6] = row % 8 > 1  # few rows with many labels of another class
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
        batch = {"x": torch.randn(16, 6, 4), "labels": labels}

        def loss_fn(model, batch):
            return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["labels"].flatten())

        with pytest.raises(NotDecomposableError, match=r'token_count\("labels"\)'):
            self.quietly(model, loss_fn, batch, precision=name)

    @BY_NAME
    def test_a_sum_is_caught(self, name):
        def loss_fn(model, batch):
            return F.mse_loss(model(batch[0]), batch[1], reduction="sum")

        model = net()
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, precision=name)
        step = gradfold.TrainStep(accumulator, torch.optim.SGD(model.parameters(), 1e-3))
        with pytest.raises(NotDecomposableError, match="sum"):
            for _ in range(8):  # in float16 it overflows first, which decides nothing
                step(rows(16))

    def test_it_leaves_no_trace_and_no_scale(self):
        model, batch = net(), rows(16)
        twin = copy.deepcopy(model)
        scaler = scaler_of()
        self.quietly(model, squares, batch, precision=gradfold.Precision(torch.float16, scaler))
        plain_window(twin, batch, 8, torch.float16, scaler_of())
        assert_equal(gradients(model), gradients(twin))
        assert scaler.state_dict() == scaler_of().state_dict()

    def test_a_scale_that_overflows_decides_nothing_and_it_looks_again(self):
        model = net()
        labels = torch.tensor([0, 1, 2, -100] * 4)
        labels[:8] = torch.tensor([0] + [-100] * 6 + [2])

        def loss_fn(model, batch):
            return F.cross_entropy(model(batch[0]), batch[1])

        accumulator = gradfold.Accumulator(
            model, loss_fn, micro_batch_size=8, precision=gradfold.Precision(torch.float16, scaler_of(2.0**60))
        )
        step = gradfold.TrainStep(accumulator, torch.optim.SGD(model.parameters(), 0.1))
        assert not step((torch.randn(16, 4), labels)).applied
        accumulator.grad_scaler.load_state_dict(scaler_of().state_dict())
        with pytest.raises(NotDecomposableError):
            step((torch.randn(16, 4), labels))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_models_of_a_small_dtype(self, dtype):
        for seed in range(6):
            torch.manual_seed(seed)
            self.quietly(net(dtype), squares, rows(16, dtype))
            self.quietly(net(dtype), squares, rows(16, dtype), precision=gradfold.Precision(keep_accumulate_dtype=True))


class TestVerify:
    @pytest.mark.parametrize("precision", ["bf16", "fp16", gradfold.Precision(keep_accumulate_dtype=True)], ids=str)
    def test_proves_in_float64(self, precision):
        model, batch = net(), rows(8)

        def loss_fn(model, batch):
            return F.mse_loss(model(batch[0]), batch[1])

        verdict = gradfold.verify(gradfold.Accumulator(model, loss_fn, micro_batch_size=2, precision=precision), batch)
        assert verdict.ok and verdict.dtype == verdict.precision == torch.float64
        assert verdict.max_relative_error < 1e-12

    def test_leaves_kept_gradients_as_they_are(self):
        model, batch = net(torch.bfloat16), rows(8, torch.bfloat16)
        keep = gradfold.Precision(keep_accumulate_dtype=True)
        accumulator = gradfold.Accumulator(model, squares, micro_batch_size=2, precision=keep)
        accumulator.backward(batch)
        before = gradients(model)
        gradfold.verify(accumulator, batch)
        assert_equal(gradients(model), before)
        assert grad_dtypes(model) == {torch.float32}
