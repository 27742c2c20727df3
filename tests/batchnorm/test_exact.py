"""Exact BatchNorm: gradients and running statistics of the whole batch, however it is cut."""

from __future__ import annotations

import copy
import gc
import threading
from contextvars import ContextVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import assert_same_state, gradients, relative_error, state
from resnet18 import classify, resnet18
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold.batchnorm.coroutines import Coroutine

PARTS = (1, 2, 3, 4, 5, 5, 6, 7)  # 33 rows, one of them alone


def squares(model, batch):
    return model(batch).square().mean()


def whole(model, loss_fn, batch):
    """A copy of the model after the whole batch at once, in plain torch."""
    model = copy.deepcopy(model)
    model.zero_grad()
    loss_fn(model, batch).backward()
    return model


def cut(batch, parts):
    """A window of these parts."""
    if isinstance(batch, torch.Tensor):
        micro_batches = batch.split(list(parts))
    else:
        micro_batches = zip(*[one.split(list(parts)) for one in batch], strict=True)
    return next(iter(gradfold.windows(iter(micro_batches), len(parts))))


def exact(model, loss_fn, **options):
    return gradfold.Accumulator(model, loss_fn, batch_norm="exact", **options)


def assert_equal(model, expected, tolerance=1e-12):
    assert relative_error(gradients(model), gradients(expected)) < tolerance
    for (name, found), (_, wanted) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=name)


def assert_exact(model, loss_fn, batch, parts=None, tolerance=1e-12, **options):
    expected = whole(model, loss_fn, batch)
    result = exact(model, loss_fn, **options).backward(batch if parts is None else cut(batch, parts))
    assert_equal(model, expected, tolerance)
    return result


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_a_network_like_resnet_18_in_eight_unequal_parts():
    torch.manual_seed(0)
    model = resnet18().double()
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 20
    batch = torch.randn(33, 3, 16, 16, dtype=torch.float64), torch.randint(0, 10, (33,))
    local = copy.deepcopy(model)
    gradfold.Accumulator(local, classify, batch_norm="per_micro_batch").backward(cut(batch, (4, 4, 5, 5, 5, 5, 5)))
    expected = whole(model, classify, batch)
    assert relative_error(gradients(local), gradients(expected)) > 0.1  # what is asked for here is no trifle
    result = assert_exact(model, classify, batch, PARTS)
    assert result.num_micro_batches == 8 and not result.recoveries
    torch.testing.assert_close(result.loss, classify(whole(model, classify, batch), batch).detach(), rtol=1, atol=1)


class Random(nn.Module):
    """A small network drawn by hypothesis: BatchNorm in 1 to 3 dimensions, with branches and layers called twice."""

    def __init__(self, dims, channels, layers, affine, momentum, tracks):
        super().__init__()
        conv, norm = [(nn.Linear, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d)][dims - 1]
        kernel = () if dims == 1 else (1,)
        self.ways = layers
        self.maps = nn.ModuleList([conv(channels, channels, *kernel) for _ in layers])
        options = {"affine": affine, "momentum": momentum, "track_running_stats": tracks}
        self.norms = nn.ModuleList([norm(channels, **options) for _ in layers])
        self.last = nn.Linear(channels, 2)

    def forward(self, x):
        for way, one, norm in zip(self.ways, self.maps, self.norms, strict=True):
            if way == "plain":
                x = norm(one(x)).tanh()
            elif way == "residual":
                x = x + norm(one(x).tanh())
            elif way == "branches":
                x = norm(one(x)) + F.batch_norm(x.sin(), None, None, training=True)
            else:
                x = norm(one(norm(x)).tanh())
        return self.last(x.flatten(2).mean(2) if x.dim() > 2 else x)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    dims=st.integers(1, 3),
    channels=st.integers(1, 4),
    layers=st.lists(st.sampled_from(["plain", "residual", "branches", "twice"]), min_size=1, max_size=3),
    parts=st.lists(st.integers(1, 5), min_size=2, max_size=5),
    affine=st.booleans(),
    momentum=st.sampled_from([0.1, 1.0, None]),
    tracks=st.booleans(),
    mean=st.sampled_from([0.0, 3.0]),
)
def test_small_networks(dims, channels, layers, parts, affine, momentum, tracks, mean):
    torch.manual_seed(sum(parts) + channels)
    model = Random(dims, channels, layers, affine, momentum, tracks).double()
    shape = {1: (), 2: (2, 3), 3: (2, 1, 2)}[dims]
    batches = [torch.randn(sum(parts), channels, *shape, dtype=torch.float64) + mean for _ in "ab"]
    # Where BatchNorm makes all of a gradient vanish, what is left is rounding: two rows of one channel, for example.
    assume(any(one.norm() >= 1e-3 for one in gradients(whole(model, squares, batches[0])).values()))
    accumulator = exact(model, squares)
    for batch in batches:
        expected = whole(model, squares, batch)
        model.zero_grad()
        accumulator.backward(cut(batch, parts))
        assert_equal(model, expected)


def test_a_mean_of_1e4_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    batch = torch.randn(33, 3) + 1e4
    truth = whole(model.double(), squares, batch.double())
    model.float()
    full = relative_error(gradients(whole(model, squares, batch)), gradients(truth))
    exact(model, squares).backward(cut(batch, PARTS))
    assert relative_error(gradients(model), gradients(truth)) < max(3 * full, 1e-5)
    assert float((model[0].running_var - truth[0].running_var).abs().max()) < 2e-4  # E[x^2] - E[x]^2 would give 0.8


def test_float32_is_within_the_law():
    torch.manual_seed(0)
    model = resnet18()
    batch = torch.randn(32, 3, 8, 8), torch.randint(0, 10, (32,))
    truth = whole(copy.deepcopy(model).double(), classify, (batch[0].double(), batch[1]))
    full = relative_error(gradients(whole(model, classify, batch)), gradients(truth))
    exact(model, classify, micro_batch_size=4).backward(batch)
    assert relative_error(gradients(model), gradients(truth)) < 2 * full


def perceptron(*norms):
    torch.manual_seed(0)
    layers = [layer for norm in norms for layer in (nn.Linear(4, 4), norm, nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(4, 2)).double()


def rows(count=12, channels=4, seed=0):
    return torch.randn(count, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_one_micro_batch_is_the_batch():
    assert_exact(perceptron(nn.BatchNorm1d(4)), squares, rows())


def test_parts_of_one_row():
    assert_exact(perceptron(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), squares, rows(5), micro_batch_size=1)


def test_layers_in_evaluation_mode_are_run_one_after_another():
    model = perceptron(nn.BatchNorm1d(4), nn.BatchNorm1d(4)).eval()
    order = []

    def loss_fn(model, batch):
        order.append("forward")
        loss = squares(model, batch)
        loss.register_hook(lambda gradient: order.append("backward"))
        return loss

    assert_exact(model, loss_fn, rows(), micro_batch_size=4, self_check=False)
    assert order[2:] == ["forward", "backward"] * 3


def test_some_layers_in_evaluation_mode_and_frozen_ones():
    model = perceptron(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[1].eval()
    model[4].requires_grad_(False)
    assert_exact(model, squares, rows(), (1, 2, 3, 4, 2))


def test_a_frozen_stem_gets_no_graph():
    model = perceptron(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    model[:3].requires_grad_(False)
    seen = []

    def loss_fn(model, batch):
        hidden = model[:3](batch)
        seen.append(hidden.requires_grad)
        return model[3:](hidden).square().mean()

    assert_exact(model, loss_fn, rows(), micro_batch_size=5)
    assert not any(seen)


def test_several_updates_and_gradients_that_were_there():
    model, twin = perceptron(nn.BatchNorm1d(4)), perceptron(nn.BatchNorm1d(4))
    accumulator = exact(model, squares, micro_batch_size=5)
    ours, theirs = (torch.optim.SGD(one.parameters(), 0.1) for one in (model, twin))
    for update in range(4):
        accumulator.backward(rows(seed=update))
        squares(twin, rows(seed=update)).backward()
        if update % 2:  # two windows into one gradient
            assert_equal(model, twin)
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
    assert model[1].num_batches_tracked == 4


def test_weights_terms_metrics_and_parts_that_weigh_nothing():
    model = perceptron(nn.BatchNorm1d(4))
    labels = torch.tensor([0, 1, -100, 1, -100, -100, -100, -100, 0, 1, 1, 0])

    def loss_fn(model, batch):
        outputs = model(batch[0])
        terms = {"tokens": F.cross_entropy(outputs, batch[1]), "size": outputs.square().mean()}
        return terms, {"outputs": outputs.sum(1), "mean": outputs.mean()}

    def loss(model, batch):
        return sum(loss_fn(model, batch)[0].values())

    batch = rows(), labels
    weight = {"tokens": gradfold.token_count(1), "size": "samples"}
    expected = whole(model, loss, batch)
    _, metrics = loss_fn(copy.deepcopy(model), batch)
    result = exact(model, loss_fn, micro_batch_size=2, weight=weight).backward(batch)
    assert_equal(model, expected)
    torch.testing.assert_close(result.metrics["outputs"], metrics["outputs"].detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result.metrics["mean"], metrics["mean"].detach(), rtol=1e-12, atol=1e-12)

    def only_tokens(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    model.zero_grad()
    expected = whole(model, only_tokens, batch)
    result = exact(model, only_tokens, micro_batch_size=2, weight=weight["tokens"], self_check=False).backward(batch)
    assert_equal(model, expected)  # rows 4 to 7 weigh nothing, and are in the statistics
    assert result.num_micro_batches == 6


class TwoHeads(nn.Module):
    def __init__(self, is_random=False):
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 1)
        self.chooses = is_random

    def forward(self, x):
        if not self.chooses:
            return self.last(self.a(x) + self.b(x.sin()))
        return self.last(self.a(x) if float(x[0, 0]) > 0 else self.b(x))


def test_a_layer_that_is_not_used_is_no_matter():
    model = nn.ModuleDict({"used": perceptron(nn.BatchNorm1d(4)), "unused": nn.BatchNorm1d(4)}).double()
    assert_exact(model, lambda model, batch: squares(model["used"], batch), rows(), micro_batch_size=5)
    assert model["unused"].num_batches_tracked == 0


def test_statistics_without_a_gradient():
    """A teacher in training mode, under no_grad."""
    model = nn.ModuleDict({"student": perceptron(nn.BatchNorm1d(4)), "teacher": perceptron(nn.BatchNorm1d(4))})

    def loss_fn(model, batch):
        with torch.no_grad():
            target = model["teacher"](batch.cos())
        return (model["student"](batch) - target).square().mean()

    assert_exact(model, loss_fn, rows(), micro_batch_size=5)


def test_a_loss_that_leaves_a_branch_out():
    model = TwoHeads().double()

    def loss_fn(model, batch):
        return (model.a(batch) + model.b(batch).detach()).square().mean() + squares(model.last, batch)

    assert_exact(model, loss_fn, rows(), micro_batch_size=5)


def test_lazy_layers():
    torch.manual_seed(0)
    model, made = (nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 2)).double() for _ in "ab")
    made[2].load_state_dict(model[2].state_dict())
    torch.manual_seed(3)
    exact(model, squares, micro_batch_size=5).backward(rows())
    torch.manual_seed(3)
    squares(made, rows()).backward()
    assert_equal(model, made)


def test_a_user_s_own_layer_in_functional_form():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("variance", torch.ones(4))

        def forward(self, x):
            x = torch.batch_norm(self.first(x), None, None, self.mean, self.variance, self.training, 0.3, 1e-3, False)
            return self.last(x.tanh())

    torch.manual_seed(0)
    assert_exact(Own().double(), squares, rows(), micro_batch_size=5)  # with the guard on


def test_channels_last_and_gradients_with_odd_strides():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = model.double().to(memory_format=torch.channels_last)
    batch = torch.randn(10, 3, 6, 6, dtype=torch.float64).to(memory_format=torch.channels_last)
    assert_exact(model, lambda model, batch: model(batch).sum((2, 3)).tanh().mean(), batch, micro_batch_size=3)


def test_bfloat16_autocast_is_as_near_as_the_full_batch():
    torch.manual_seed(0)
    model = resnet18()
    batch = torch.randn(32, 3, 8, 8), torch.randint(0, 10, (32,))
    truth = gradients(whole(model, classify, batch))

    def under_autocast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return classify(model, batch)

    full = relative_error(gradients(whole(model, under_autocast, batch)), truth)
    exact(model, classify, micro_batch_size=4, precision="bf16").backward(batch)
    assert relative_error(gradients(model), truth) < 1.5 * full


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_types_are_as_near_as_the_full_batch(dtype):
    """Parameters and running statistics too: statistics are formed in float32, as by torch's own kernel."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False)
    ).to(dtype)
    batch = (torch.randn(33, 3, 8, 8) + 1).to(dtype)

    def loss_fn(model, batch):
        return model(batch).relu().to(torch.promote_types(batch.dtype, torch.float32)).square().mean()

    truth = whole(copy.deepcopy(model).double(), loss_fn, batch.double())
    full = whole(model, loss_fn, batch)
    exact(model, loss_fn, micro_batch_size=5).backward(batch)
    limit = max(2 * relative_error(gradients(full), gradients(truth)), 4 * torch.finfo(dtype).eps)
    assert relative_error(gradients(model), gradients(truth)) < limit
    for (name, found), wanted in zip(model.named_buffers(), full.buffers(), strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-3, msg=name)


def test_bfloat16_parameters_sum_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[1].to(torch.bfloat16)
    batch = torch.randn(512, 4)

    def loss_fn(model, batch):
        return F.linear(model[0](batch).bfloat16(), model[1].weight, model[1].bias).float().exp().mean()

    expected = whole(model, loss_fn, batch)
    exact(model, loss_fn, micro_batch_size=2).backward(batch)
    assert relative_error(gradients(model), gradients(expected)) < 0.005


def test_state_of_the_calling_thread_is_that_of_the_others():
    model = perceptron(nn.BatchNorm1d(4)).float()
    seen = []

    def loss_fn(model, batch):
        seen.append((torch.is_autocast_enabled("cpu"), torch.zeros(1).device.type, note.get()))
        return squares(model, batch)

    class Device(TorchFunctionMode):
        """A mode of the user's, as torch.set_default_device is one."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            given = {"device": "meta"} if func is torch.zeros else {}
            return func(*args, **(given | (kwargs or {})))

    note = ContextVar("note")
    note.set("from the caller")
    accumulator = exact(model, loss_fn, micro_batch_size=6, self_check=False)
    with torch.autocast("cpu", torch.bfloat16), Device():
        accumulator.backward(rows().float())
    assert seen == [(True, "meta", "from the caller")] * 2


def test_compiled_models():
    model = perceptron(nn.BatchNorm1d(4))
    expected = whole(model, squares, rows())
    compiled = torch.compile(model, backend="eager")
    compiled(rows(4)).sum()
    model.load_state_dict(perceptron(nn.BatchNorm1d(4)).state_dict())
    exact(compiled, squares, micro_batch_size=5).backward(rows())
    assert_equal(model, expected)


def test_dropout_is_the_same_when_the_window_runs_again():
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout()
    )
    found = []
    for _ in "ab":
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        exact(twin, squares, micro_batch_size=5).backward(rows().float())
        found.append(gradients(twin))
    assert relative_error(*found) == 0


class TestRefusals:
    def refuses(self, model, loss_fn, batch, *words, error=gradfold.BatchNormError, **options):
        before = state(model)
        with pytest.raises(error) as caught:
            exact(model, loss_fn, **{"micro_batch_size": 4, "self_check": False, **options}).backward(batch)
        for word in words:
            assert word in str(caught.value)
        assert_same_state(state(model), before)
        return caught.value

    def test_ways_that_depend_on_the_data(self):
        batch = rows()
        batch[:, 0] = torch.tensor([1.0] * 8 + [-1.0] * 4)
        error = self.refuses(
            TwoHeads(True).double(), squares, batch, "micro-batch 0 (rows 0 to 3)", "in a (4", "in b (4"
        )
        assert error.layers == ("a", "b")

    def test_a_layer_that_some_rows_do_not_reach(self):
        def loss_fn(model, batch):
            return squares(model, batch) if float(batch[0, 0]) > 0 else batch.sum() * model[0].weight.sum()

        for sign in (1, -1):
            batch = rows()
            batch[:, 0] = sign * torch.tensor([1.0] * 8 + [-1.0] * 4)
            self.refuses(perceptron(nn.BatchNorm1d(4)), loss_fn, batch, "is at its end", "is at BatchNorm in 1")

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpoints_around_batch_norm(self, use_reentrant):
        def loss_fn(model, batch):
            inputs = batch.clone().requires_grad_()
            return checkpoint(model, inputs, use_reentrant=use_reentrant).square().mean()

        error = self.refuses(perceptron(nn.BatchNorm1d(4)), loss_fn, rows(), "torch.utils.checkpoint", "BatchNorm in 1")
        assert error.layers == ("1",)

    def test_a_custom_checkpoint(self):
        class Checkpoint(torch.autograd.Function):
            @staticmethod
            def forward(ctx, model, inputs):
                ctx.model, ctx.inputs = model, inputs.detach()
                return model(inputs)

            @staticmethod
            def backward(ctx, gradient):
                with torch.enable_grad():
                    inputs = ctx.inputs.requires_grad_()
                    torch.autograd.backward(ctx.model(inputs), gradient)
                return None, inputs.grad

        def loss_fn(model, batch):
            return Checkpoint.apply(model, batch.clone().requires_grad_()).square().mean()

        self.refuses(
            perceptron(nn.BatchNorm1d(4)), loss_fn, rows(), "inside an activation checkpoint", "BatchNorm in 1"
        )

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_checkpoints_elsewhere_are_fine(self, use_reentrant):
        model = perceptron(nn.BatchNorm1d(4), nn.BatchNorm1d(4))

        def loss_fn(model, batch):
            hidden = model[:2](batch)
            hidden = checkpoint(model[2:4], hidden, use_reentrant=use_reentrant)
            return model[4:](hidden).square().mean()

        assert_exact(model, loss_fn, rows(), micro_batch_size=5)

    def test_scripted_modules(self):
        model = perceptron(nn.BatchNorm1d(4))
        with pytest.warns(DeprecationWarning):
            model[1] = torch.jit.script(model[1])
        self.refuses(model, squares, rows(), "BatchNorm in 1 could not be intercepted: it is scripted")

    def test_a_layer_that_is_not_intercepted(self):
        class Own(nn.BatchNorm1d):
            def forward(self, x):
                self.num_batches_tracked.add_(1)
                return torch.ops.aten.native_batch_norm(
                    x, self.weight, self.bias, self.running_mean, self.running_var, True, 0.1, 1e-5
                )[0]

        self.refuses(perceptron(Own(4)), squares, rows(), "BatchNorm in 1 could not be intercepted")
        model = perceptron(Own(4))

        def without_hooks(model, batch):
            return model[2:](model[1].forward(model[0](batch))).square().mean()

        self.refuses(model, without_hooks, rows(), "BatchNorm in 1 could not be intercepted")

    def test_a_gradient_within_the_loss(self):
        def loss_fn(model, batch):
            batch = batch.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(batch).sum(), batch, create_graph=True)
            return gradient.square().mean()

        self.refuses(perceptron(nn.BatchNorm1d(4)), loss_fn, rows(), "differentiates through BatchNorm in 1")

    def test_one_value_per_channel(self):
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).double()

        def halves(model, batch):
            return squares(model, batch[:0] if len(batch) == 1 else batch)

        self.refuses(model, halves, rows(2), "more than 1 value per channel", error=ValueError, micro_batch_size=1)

    def test_options_that_are_not_supported_together(self):
        with pytest.raises(gradfold.OptionError, match="skip_micro_batch"):
            exact(perceptron(), squares, on_non_finite="skip_micro_batch")
        with pytest.raises(gradfold.OptionError, match="exact"):
            gradfold.windows([], 2, model=perceptron(), batch_norm="exact")


class TestFaults:
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("at", [1, 4, 5, 9, "backward"])
    def test_everything_is_as_it_was(self, error, at):
        model = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4), nn.BatchNorm1d(4)
        ).double()
        squares(model, rows(seed=3)).backward()
        calls = 0

        def loss_fn(model, batch):
            nonlocal calls
            for layer in model:
                calls += 1
                if calls == at:
                    raise error("now")
                batch = layer(batch)
            if at == "backward":
                batch.register_hook(lambda gradient: (_ for _ in ()).throw(error("now")))
            return batch.square().mean()

        before = state(model)
        accumulator = exact(model, loss_fn, micro_batch_size=4, self_check=False)
        with pytest.raises(error, match="now"):
            accumulator.backward(rows())
        assert_same_state(state(model), before)
        at = None  # it goes well from now on
        assert accumulator.backward(rows()).num_micro_batches == 3

    def test_an_interrupt_that_reaches_the_waiting_thread(self, monkeypatch):
        """Twice, as by a user in a hurry."""
        model = perceptron(nn.BatchNorm1d(4))
        before = state(model)
        advance, join = Coroutine.advance, Coroutine.join
        calls, joins = [], []

        def interrupted(self):
            advance(self)
            calls.append(self)
            if len(calls) == 2:
                raise KeyboardInterrupt

        def interrupted_join(self):
            joins.append(self)
            if len(joins) == 1:
                raise KeyboardInterrupt
            join(self)

        monkeypatch.setattr(Coroutine, "advance", interrupted)
        monkeypatch.setattr(Coroutine, "join", interrupted_join)
        with pytest.raises(KeyboardInterrupt):
            exact(model, squares, micro_batch_size=4, self_check=False).backward(rows())
        assert_same_state(state(model), before)

    @pytest.mark.parametrize("where", ["forward", "backward"])
    def test_memory_that_runs_out_halves_the_micro_batches(self, where):
        model = perceptron(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        expected = whole(model, squares, rows())

        def full(rows):
            if rows > 3:
                raise torch.OutOfMemoryError("out of memory")

        def loss_fn(model, batch):
            hidden = model[:4](batch)
            if where == "forward":
                full(len(batch))
            else:
                hidden.register_hook(lambda gradient: full(len(gradient)))
            return model[4:](hidden).square().mean()

        result = exact(model, loss_fn, micro_batch_size=6, self_check=False).backward(rows())
        assert_equal(model, expected)
        (recovery,) = result.recoveries
        assert recovery.action == "halved" and not recovery.changes_batch_statistics
        assert result.num_micro_batches == 4

    def test_nothing_of_a_window_stays_alive(self):
        model = perceptron(nn.BatchNorm1d(4))
        accumulator = exact(model, squares, micro_batch_size=4)
        for _ in range(2):
            accumulator.backward(rows())
        gc.collect()
        before = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
        accumulator.backward(rows())
        assert sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()) <= before

    def test_a_gradient_that_is_not_finite(self):
        model = perceptron(nn.BatchNorm1d(4))
        batch = rows()
        batch[5, 2] = torch.nan
        with pytest.raises(gradfold.NonFiniteLossError, match=r"micro-batch 1 of 3 \(rows 4 to 7\)") as caught:
            exact(model, squares, micro_batch_size=4).backward(batch)
        assert caught.value.micro_batch == 1  # though the losses of all are NaN
        accumulator = exact(model, squares, micro_batch_size=4, on_non_finite="skip_update")
        assert accumulator.backward(batch).is_skipped and gradients(model) == {}

        def loss_fn(model, batch):
            return (model(batch) * 0).abs().sqrt().mean()

        with pytest.raises(
            gradfold.NonFiniteGradientError, match=r"is not finite .* the offending one cannot be named"
        ) as caught:
            exact(model, loss_fn, micro_batch_size=4, self_check=False).backward(rows())
        assert "0.weight" in caught.value.parameters


def test_the_guard_sees_what_is_wrong_besides():
    """Exact BatchNorm is held as right, and a sum in the place of a mean is not."""
    model = perceptron(nn.BatchNorm1d(4))
    exact(model, squares, micro_batch_size=4).backward(rows(16))
    with pytest.raises(gradfold.NotDecomposableError) as caught:
        exact(model, lambda model, batch: model(batch).square().sum(), micro_batch_size=4).backward(rows(16))
    assert caught.value.cause == "sum"


def test_a_users_own_hooks_on_saved_tensors_are_called():
    model = perceptron(nn.BatchNorm1d(4))
    packed = []

    def pack(tensor):
        packed.append(threading.current_thread().name)
        return tensor

    expected = whole(model, squares, rows())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        exact(model, squares, micro_batch_size=4, self_check=False).backward(rows())
    assert "gradfold" in packed
    assert_equal(model, expected)


class Rebinding(nn.BatchNorm1d):
    """Counts as torch did before 2.0, with the plain average over batches."""

    def count(self):
        self.num_batches_tracked = self.num_batches_tracked + 1

    def forward(self, x):
        self.count()
        momentum = 1 / float(self.num_batches_tracked)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps)


class Copying(Rebinding):
    def count(self):
        self.num_batches_tracked.copy_(self.num_batches_tracked + 1)


class Hiding(Rebinding):
    def count(self):
        self.num_batches_tracked.data += 1


@pytest.mark.parametrize("kind", [Rebinding, Copying, Hiding])
def test_layers_that_count_in_their_own_way_count_once(kind):
    """They counted once per micro-batch, and the average of the next batches was another."""
    shared = kind(4)
    model = perceptron(shared, kind(4), shared)
    twin = copy.deepcopy(model)
    accumulator = exact(model, squares, micro_batch_size=5)
    for seed in range(3):
        for one in (model, twin):
            one.zero_grad()
        accumulator.backward(rows(seed=seed))
        squares(twin, rows(seed=seed)).backward()
        assert_equal(model, twin)
    assert int(shared.num_batches_tracked) == 6
