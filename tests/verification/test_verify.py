"""The proof on a user's own model: what it compares, what it names, and that it leaves no trace."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_state, state
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo.case import Module, classes, images, net, pad, sentences, tagger, tokens, two_views
from zoo.coupled import contrastive
from zoo.right import convolution, cross_entropy, token_cross_entropy

import gradfold
from gradfold.messages import join_names
from gradfold.verification.comparison import choose_sizes
from gradfold.verification.verdict import Cause, ParameterRow, Verdict, number


def verify(model, loss_fn, batch, options=None, **rest):
    return gradfold.verify(
        gradfold.Accumulator(model, loss_fn, **({"micro_batch_size": 8} | (options or {}))), batch, **rest
    )


def causes(verdict):
    return [cause.name for cause in verdict.causes]


# --- What it says


def test_a_loss_that_is_right():
    verdict = verify(net(), cross_entropy, classes())
    assert verdict.ok and verdict.max_relative_error < 1e-14 and verdict.noise_floor < 1e-14
    assert [row.size for row in verdict.sizes] == [1, 2, 3, 6, 8]
    assert [row.num_micro_batches for row in verdict.sizes] == [16, 8, 6, 3, 2]
    assert [(row.name, row.shape) for row in verdict.rows][:2] == [("0.weight", (6, 4)), ("0.bias", (6,))]
    assert (verdict.dtype, verdict.precision, verdict.tolerance) == (torch.float64, torch.float64, 1e-12)
    assert verdict.raise_if_wrong() is None
    assert str(verdict).startswith("EXACT: ")


def test_a_loss_that_is_wrong_and_what_to_write():
    verdict = verify(tagger(), token_cross_entropy, tokens())
    assert not verdict.ok and causes(verdict) == ["weights"]
    assert verdict.causes[0].weight == 'gradfold.token_count("labels")'
    assert "of the batch of 16" in verdict.causes[0].text
    assert max(row.error for row in verdict.sizes) == verdict.max_relative_error > 0.1
    with pytest.raises(gradfold.NotDecomposableError, match="NOT EXACT: ") as caught:
        verdict.raise_if_wrong()
    assert caught.value.cause == "weights" and caught.value.weight == verdict.causes[0].weight


def test_the_rows_are_those_of_plain_torch():
    model, batch = (
        net().double(),
        tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in classes()),
    )
    verdict = verify(model, cross_entropy, batch)
    cross_entropy(model, batch).backward()
    for row, parameter in zip(verdict.rows, model.parameters(), strict=True):
        assert row.norm == pytest.approx(float(parameter.grad.norm()), rel=1e-12)


def test_a_broken_engine_is_seen(monkeypatch):
    real = gradfold.engine.loss_terms.LossTerms.add
    monkeypatch.setattr(
        gradfold.engine.loss_terms.LossTerms,
        "add",
        lambda self, index, loss: [(a, b * 1.001) for a, b in real(self, index, loss)],
    )
    verdict = verify(net(), cross_entropy, classes())
    assert not verdict.ok and causes(verdict) == ["unknown"]
    assert verdict.max_relative_error == pytest.approx(1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_precision_of_the_copy(dtype):
    verdict = verify(net(), cross_entropy, classes(), dtype=dtype)
    assert verdict.ok and verdict.dtype == verdict.precision == dtype
    assert verdict.tolerance == (
        1e-12 if dtype == torch.float64 else pytest.approx(max(2e-6, 30 * verdict.noise_floor))
    )


# --- No trace


class Everything(nn.Module):
    """Dropout, running statistics, a counter and a buffer that is rebound."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)
        self.norm = nn.InstanceNorm1d(5, track_running_stats=True)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + len(x)
        hidden = self.first(x)
        return self.last(self.drop(self.norm(torch.stack([hidden, hidden.tanh()], 2)).mean(2)))


def everywhere():
    numpy = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().tolist(), random.getstate(), numpy["key"].tolist(), numpy["pos"]


@pytest.mark.parametrize("fault", ["none", "wrong", "draws", "raises"])
def test_the_users_model_and_random_states_stay_as_they_are(fault):
    model, outside, batch = Everything(), nn.Linear(3, 3), classes()
    outside.weight.grad = torch.ones(3, 3)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    def loss_fn(given, batch):
        if fault == "draws":
            np.random.standard_normal(), random.random()
        if fault == "raises":
            given(batch[0])
            raise LookupError("of the user's")
        loss = F.cross_entropy(given(batch[0]) @ outside.weight.to(batch[0]).T, batch[1])
        return loss.sqrt() if fault == "wrong" else loss

    before, kept = state(model), [parameter.grad for parameter in model.parameters()]
    inputs, states, default = [tensor.clone() for tensor in batch], everywhere(), torch.get_default_dtype()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8)
    if fault == "raises":
        with pytest.raises(LookupError):
            gradfold.verify(accumulator, batch)
    else:
        assert gradfold.verify(accumulator, batch).ok == (fault == "none")
    assert_same_state(state(model), before)
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), kept, strict=True))
    assert torch.equal(outside.weight.grad, torch.ones(3, 3)) and outside.bias.grad is None
    assert model.calls == 0 and accumulator.num_windows == 0 and model.training
    assert everywhere() == states and torch.get_default_dtype() == default
    assert all(map(torch.equal, batch, inputs))


def test_a_generator_of_the_users_own_is_set_back():
    generator = torch.Generator().manual_seed(1)

    def loss_fn(model, batch):
        return cross_entropy(
            model, (batch[0] + torch.randn(batch[0].shape, generator=generator).to(batch[0]), batch[1])
        )

    before = generator.get_state()
    assert verify(net(), loss_fn, classes()).ok
    assert torch.equal(generator.get_state(), before)


def test_a_model_that_changes_its_input_in_place():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0].mul_(2)), batch[1])

    x, y = classes()
    before = x.clone()
    assert verify(net(), loss_fn, (x, y)).ok
    assert torch.equal(x, before)


def test_under_no_grad():
    with torch.no_grad():
        assert verify(net(), cross_entropy, classes()).ok
        assert not torch.is_grad_enabled()


# --- Random numbers


def dropping():
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))


def test_dropout_is_proved_with_the_masks_of_the_whole_batch():
    verdict = verify(dropping(), cross_entropy, classes())
    assert verdict.ok and verdict.notes == ()


def test_rows_that_weigh_nothing_run_last_and_keep_their_masks():
    def loss_fn(model, batch):
        loss = F.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["labels"].flatten())
        return loss, {"one": torch.ones(())}

    batch = tokens()
    batch["labels"][:3] = -100
    model = nn.Sequential(nn.Embedding(11, 6), nn.Dropout(0.5), nn.Linear(6, 5))
    verdict = verify(model, loss_fn, batch, {"weight": gradfold.token_count("labels")})
    assert verdict.ok and verdict.notes == ()


def test_dropout_over_padding_of_another_length_is_frozen():
    model = nn.Sequential(nn.Embedding(11, 6), nn.Dropout(0.5), nn.Linear(6, 5))
    weight = gradfold.token_count("labels")
    verdict = verify(model, token_cross_entropy, sentences(), {"weight": weight, "collate": pad})
    assert verdict.ok and "evaluation mode" in verdict.notes[0] and "1" in verdict.notes[0]
    assert model.training and model[1].training


def test_random_numbers_that_belong_to_no_row():
    def permuted(model, batch):
        return cross_entropy(model, (batch[0] + batch[0][torch.randperm(len(batch[0]))], batch[1]))

    def with_numpy(model, batch):
        return cross_entropy(model, batch) * float(np.random.random_sample())

    def with_python(model, batch):
        return cross_entropy(model, batch) * random.random()

    for loss_fn, name in ((permuted, "randperm"), (with_numpy, "numpy.random"), (with_python, "random")):
        verdict = verify(net(), loss_fn, classes())
        assert not verdict.ok and causes(verdict) == ["random"]
        assert name in verdict.causes[0].text and "inconclusive" in verdict.causes[0].text
        assert str(verdict).startswith("INCONCLUSIVE: ")


def test_a_collate_that_draws():
    def collate(samples):
        batch = pad(samples)
        return batch | {"ids": batch["ids"].masked_fill(torch.rand(batch["ids"].shape) < 0.3, 1)}

    weight = gradfold.token_count("labels")
    verdict = verify(tagger(), token_cross_entropy, sentences(), {"weight": weight, "collate": collate})
    assert causes(verdict) == ["random"] and "collate" in verdict.causes[0].text


@pytest.mark.parametrize("growth", [0.02, 1e-9, 1e-14])
def test_a_loss_that_counts_its_calls(growth):
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return cross_entropy(model, batch) * (1 + growth * len(calls))

    verdict = verify(net(), loss_fn, classes())
    if growth > 1e-12:
        assert causes(verdict) == ["random"] and "differ by" in verdict.causes[0].text
    else:  # so little is what kernels do that add up in any order
        assert verdict.ok and verdict.noise_floor >= growth / 2


def test_a_run_that_differs_a_little_is_noise():
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return cross_entropy(model, batch) * (1 + 3e-13 * (len(calls) == 2))

    verdict = verify(net(), loss_fn, classes())
    assert verdict.ok and verdict.noise_floor == pytest.approx(3e-13, rel=0.1)
    assert verdict.tolerance == 30 * verdict.noise_floor


def test_a_run_that_differs_much_is_no_proof_though_the_parts_fit():
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return cross_entropy(model, batch) * (1 + (len(calls) == 2))

    verdict = verify(net(), loss_fn, classes())
    assert verdict.max_relative_error < 1e-12 and causes(verdict) == ["random"]
    assert verdict.headline.startswith("INCONCLUSIVE: ") and math.isnan(verdict.noise_floor)


def test_draws_laid_out_as_nobody_can_know_are_the_same_for_all_rows():
    def forward(self, x):  # rows and steps in one dimension, steps first
        hidden = self.drop(self.first(x).transpose(0, 1).flatten(0, 1))
        return self.last(hidden.view(5, len(x), 5).mean(0))

    model = Module(forward, first=nn.Linear(4, 5), drop=nn.Dropout(0.5), last=nn.Linear(5, 3))
    batch = torch.randn(16, 5, 4), classes()[1]
    verdict = verify(model, cross_entropy, batch)
    assert verdict.ok and "all rows had the same random numbers" in verdict.notes[0]
    verdict = verify(model, lambda model, batch: cross_entropy(model, batch).sqrt(), batch)
    assert not verdict.ok and verdict.notes == ()


def test_random_numbers_without_effect():
    def loss_fn(model, batch):
        torch.randperm(len(batch[0]))
        return cross_entropy(model, batch)

    verdict = verify(dropping(), loss_fn, classes(), micro_batch_sizes=[7, 8])  # of one row it draws none
    assert verdict.ok and verdict.notes == ()


# --- Precision


def test_the_models_own_precision_where_the_other_does_not_run():
    class_weights = torch.tensor([0.5, 2.0, 1.0])

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], weight=class_weights)

    verdict = verify(net(), loss_fn, classes(), {"weight": lambda batch: class_weights[batch[1]].sum()})
    assert verdict.ok and verdict.dtype == verdict.precision == torch.float32
    assert "float32" in verdict.notes[0] and "RuntimeError" in verdict.notes[0]
    assert verdict.tolerance >= 2e-6 and 1e-8 < verdict.noise_floor < 1e-5


def test_an_error_in_both_precisions_is_the_users():
    def loss_fn(model, batch):
        raise LookupError("of the user's")

    with pytest.raises(LookupError):
        verify(net(), loss_fn, classes())


def test_a_loss_in_float32_is_not_accused_for_its_rounding():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    verdict = verify(net(), loss_fn, classes(17))
    assert verdict.ok and verdict.precision == torch.float32 and verdict.dtype == torch.float64
    assert 1e-12 < verdict.max_relative_error < verdict.tolerance
    assert "float32 on the way" in str(verdict)
    assert not verify(net(), lambda model, batch: loss_fn(model, batch).sqrt(), classes()).ok


def test_a_metric_in_float32_loosens_nothing():
    def loss_fn(model, batch):
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1]), {"accuracy": (logits.argmax(1) == batch[1]).float().mean()}

    assert verify(net(), loss_fn, classes()).tolerance == 1e-12


def test_a_detached_part_in_float32_is_allowed_for():
    def loss_fn(model, batch):
        output = model(batch[0])
        scale = torch.nn.functional.linear(output.detach().float(), torch.full((1, 3), 0.1, dtype=torch.float32))
        return (F.cross_entropy(output, batch[1], reduction="none") * (scale[:, 0] / 3).double()).mean()

    assert verify(net(), loss_fn, classes()).ok


def test_tensors_that_the_model_makes_follow_the_precision():
    model = Module(lambda self, x: self.cell(x, torch.zeros(len(x), 3)), cell=nn.RNNCell(4, 3))
    verdict = verify(model, cross_entropy, classes())
    assert verdict.ok and verdict.dtype == torch.float64


def test_complex_parameters_keep_their_imaginary_part():
    model = Module(
        lambda self, x: (self.turn(x.to(torch.promote_types(x.dtype, torch.complex64)))).abs(),
        turn=nn.Linear(4, 3, dtype=torch.complex64),
    )
    verdict = verify(model, cross_entropy, classes())
    assert verdict.ok and verdict.precision == torch.float64 and verdict.max_relative_error < 1e-12


def test_a_gradient_that_rounding_moves_at_will():
    def loss_fn(model, batch):  # another rounding for every number of rows
        return (model(batch[0]) * (1 + len(batch[0]) * 2.3e-16) * 1e17).sin().mean()

    verdict = verify(net(), loss_fn, classes())
    assert causes(verdict) == ["rounding"] and verdict.noise_floor > 0.1 and verdict.tolerance <= 1e-3
    assert verdict.headline.startswith("INCONCLUSIVE: ")


def test_half_precision():
    model, (x, y) = net().bfloat16(), classes()
    verdict = verify(model, cross_entropy, (x.bfloat16(), y), dtype=torch.bfloat16)
    assert verdict.ok and verdict.precision == torch.bfloat16 and verdict.tolerance == 0.03
    verdict = verify(model, cross_entropy, (x.bfloat16(), y))
    assert verdict.ok and verdict.max_relative_error < 1e-14


def test_samples_that_are_collated_follow_the_precision():
    x, y = classes()
    collate = torch.utils.data.default_collate
    verdict = verify(net(), cross_entropy, list(zip(x, y, strict=True)), {"collate": collate})
    assert verdict.ok and verdict.dtype == verdict.precision == torch.float64


def test_a_model_that_is_itself_frozen_is_named():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head, self.dropout = nn.Embedding(11, 6), nn.Linear(6, 5), 0.3

        def forward(self, ids):
            return self.head(F.dropout(self.embed(ids), self.dropout, self.training))

    options = {"weight": gradfold.token_count("labels"), "collate": pad}
    verdict = verify(Dropping(), token_cross_entropy, sentences(), options)
    assert verdict.ok and "the model itself" in verdict.notes[0]


# --- Causes


@pytest.mark.parametrize("option", [None, "per_micro_batch"])
def test_batch_norm_is_named_and_measured(option):
    verdict = verify(convolution(nn.BatchNorm2d(4)), cross_entropy, images(), {"batch_norm": option})
    assert causes(verdict) == ["batch_norm"] and verdict.causes[0].layers == ("1",)
    assert verdict.max_relative_error > 0.1 and "nothing else is wrong" in verdict.notes[0]
    assert ("accepted" in verdict.causes[0].text) == (option is not None)


def test_what_is_wrong_besides_batch_norm():
    x, y = images()
    y[[1, 5, 9, 10, 11]] = -100
    assert causes(verify(convolution(nn.BatchNorm2d(4)), cross_entropy, (x, y))) == ["batch_norm", "weights"]


def place(model, loss_fn=cross_entropy, batch=None):
    verdict = verify(model, loss_fn, classes() if batch is None else batch)
    assert causes(verdict)[0] in ("coupled", "batch_norm")
    return verdict.causes[0].text.splitlines()[-1], verdict.causes[0].layers


def centered(function):
    return lambda self, x: function(self, self.first(x))


def two(forward):
    return Module(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3))


def test_the_place_where_rows_first_see_each_other():
    sequences = torch.randn(16, 5, 4), classes()[1]
    model = Module(lambda self, x: self.head(self.cell(x)[0].mean(1)), cell=nn.LSTM(4, 5), head=nn.Linear(5, 3))
    assert place(model, batch=sequences) == ("It first happens in the layer 'cell' (LSTM).", ("cell",))
    model = two(lambda self, x: self.last(self.first(x).softmax(0)))
    assert place(model)[0] == "It first happens in forward of Module, before 'last' (Linear) is called."
    model = two(lambda self, x: self.last(self.first(x).flip(0).cumsum(0).flip(0)))  # the first row reaches no other
    assert place(model)[0] == "It first happens in forward of Module, before 'last' (Linear) is called."
    model = nn.Sequential(two(lambda self, x: self.last(self.first(x)).softmax(0)), nn.Tanh())
    assert place(model) == ("It first happens in forward of Module ('0'), after '0.last' (Linear).", ("0",))
    assert place(net(), contrastive, two_views())[0].startswith("All layers keep the rows apart, so it is what loss_fn")
    flipped = lambda model, batch: cross_entropy(model, (batch[0] + batch[0].flip(0), batch[1]))  # noqa: E731
    assert place(net(), flipped)[0] == "It first happens in loss_fn, before Sequential is called."
    for steps_first in (False, True):  # rows and steps in one dimension
        fold = (lambda x: x.transpose(0, 1)) if steps_first else (lambda x: x)
        shape = (5, -1, 3) if steps_first else (-1, 5, 3)
        model = two(
            lambda self, x, fold=fold, shape=shape: (
                fold(self.last(self.first(fold(x).flatten(0, 1))).view(shape)).mean(1).softmax(0)
            )
        )
        assert "after 'last' (Linear)" in place(model, batch=sequences)[0]
    model = two(lambda self, x: self.last(F.batch_norm(self.first(x), None, None, training=True)))
    assert "before 'last' (Linear)" in place(model)[0]


class Centered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient - gradient.mean(0)


def test_the_place_where_rows_see_each_other_backwards():
    model = two(lambda self, x: self.last(Centered.apply(self.first(x)).tanh()))
    assert "backward pass only, between 'first' (Linear) and 'last' (Linear)" in place(model)[0]


def test_padding_that_leaks_is_told_from_rows_that_mix():
    model = Module(
        lambda self, ids: self.head(self.embed(ids).mean(1)), embed=nn.Embedding(11, 6), head=nn.Linear(6, 5)
    )

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch["ids"]), batch["labels"][:, 0])

    verdict = verify(model, loss_fn, sentences(), {"collate": pad})
    assert causes(verdict) == ["coupled"] and "Mask the padding" in verdict.causes[0].text


class Fading(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.factor, self.seen = net(), 1.0, []

    def forward(self, x):
        self.factor *= 0.5
        self.seen.append(len(x))
        return self.net(x) * self.factor


def test_state_outside_of_buffers_is_named():
    model = nn.Sequential(Fading(), nn.Tanh())
    verdict = verify(model, cross_entropy, classes())
    assert causes(verdict) == ["state"] and "(0.factor and 0.seen)" in verdict.causes[0].text
    assert model[0].factor == 1.0 and model[0].seen == []


def test_a_loss_that_uses_another_model():
    mine, other = net(), net()
    other_model = "loss_fn uses another model than the one passed to it: write loss_fn(model, batch)"
    batch, before = classes(), state(mine)
    verdict = verify(mine, lambda model, batch: cross_entropy(mine, batch), batch)
    assert causes(verdict) == ["other_model"] and verdict.causes[0].text.startswith(other_model)
    assert_same_state(state(mine), before)
    verdict = verify(mine.double(), lambda model, batch: cross_entropy(other.double(), batch), classes())
    assert causes(verdict) == ["other_model"] and "reaches no parameter" in verdict.causes[0].text
    assert all(parameter.grad is None for parameter in other.parameters())


def test_a_loss_that_is_not_finite():
    x, y = classes()
    x[3] = float("nan")
    verdict = verify(net(), cross_entropy, (x, y))
    assert causes(verdict) == ["non_finite"] and verdict.sizes == ()
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["max_relative_error"] is None


def test_micro_batches_that_do_not_run():
    def loss_fn(model, batch):
        if len(batch[0]) < 6:
            raise RuntimeError("too few rows")
        return cross_entropy(model, batch)

    verdict = verify(net(), loss_fn, classes())
    assert verdict.ok and verdict.notes == (
        "micro-batches of 1, 2, 3 and 6 do not run; the others say nothing about them.",
    )
    assert "too few rows" in verdict.sizes[0].failure
    for options, rest in (({"micro_batch_size": 4}, {}), ({}, {"micro_batch_sizes": [8, 4]})):
        verdict = verify(net(), loss_fn, classes(), options, **rest)
        assert causes(verdict) == ["fails"] and "micro-batches of 4 rows: RuntimeError" in verdict.causes[0].text


def test_a_part_whose_loss_is_not_finite():
    def loss_fn(model, batch):  # a mean over rows, but not of less than three
        return cross_entropy(model, batch) / (0.0 if len(batch[0]) < 3 else 1.0)

    verdict = verify(net(), loss_fn, classes(), micro_batch_sizes=[2, 8])
    assert causes(verdict) == ["empty"] and verdict.max_relative_error == math.inf
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["sizes"][0]["error"] is None
    assert "infinitely off" in verdict.headline


def test_the_refusals_of_an_accumulator_are_raised():
    with pytest.raises(gradfold.WeightError):
        verify(net(), cross_entropy, classes(), {"weight": {"loss": "samples", "other": "samples"}})
    with pytest.raises(gradfold.LossError):
        verify(net(), lambda model, batch: model(batch[0]), classes())
    with pytest.raises(gradfold.LossError, match="does not require grad"):
        verify(net(), lambda model, batch: cross_entropy(model, batch).detach(), classes())


# --- What it takes


def test_what_is_no_batch():
    accumulator = gradfold.Accumulator(net(), cross_entropy, micro_batch_size=8)
    (window,) = gradfold.windows([classes(), classes()], 2)
    with pytest.raises(gradfold.BatchError, match="Pass a batch"):
        gradfold.verify(accumulator, window)
    with pytest.raises(gradfold.BatchError, match="one row only"):
        gradfold.verify(accumulator, classes()[:1][0][:1])
    with pytest.raises(gradfold.BatchError, match="list of samples"):
        verify(tagger(), token_cross_entropy, tokens(), {"collate": pad})
    for wrong in ({"dtype": torch.int64}, {"dtype": "float64"}, {"micro_batch_sizes": []}):
        with pytest.raises(gradfold.OptionError):
            gradfold.verify(accumulator, classes(), **wrong)
    with pytest.raises(gradfold.OptionError, match="expected a gradfold"):
        gradfold.verify(net(), classes())
    for size in (0, 16, 2.0):
        with pytest.raises(gradfold.OptionError):
            gradfold.verify(accumulator, classes(), micro_batch_sizes=[size])


@pytest.mark.parametrize(
    ("num_rows", "own", "asked", "expected"),
    [
        (2, None, None, [1]),
        (3, 8, None, [1, 2]),
        (16, 8, None, [1, 2, 3, 6, 8]),
        (16, None, [8, 5, 8], [5, 8]),
        (64, 16, None, [10, 16, 22, 32]),
        (1000, 1, None, [1, 143, 334, 500]),
    ],
)
def test_the_sizes_that_are_tried(num_rows, own, asked, expected):
    assert choose_sizes(num_rows, own, asked) == expected


def test_models_that_cannot_be_copied():
    model = net()
    model.lock = (_ for _ in ())
    with pytest.raises(gradfold.ModelError, match=r"copy.deepcopy\(model\)"):
        verify(model, cross_entropy, classes())
    with pytest.raises(gradfold.ModelError, match="lazy"):
        verify(nn.LazyLinear(3), cross_entropy, classes())


def test_a_model_that_keeps_a_result_of_its_last_forward_pass():
    model = net()
    model.last = model[0].weight * 2
    assert verify(model, cross_entropy, classes()).ok


def test_hooks_on_gradients_are_noted():
    model = net()
    model[0].weight.register_hook(lambda gradient: gradient * 2)
    assert "0.weight" in verify(model, cross_entropy, classes()).notes[0]


def test_a_gradient_of_zero_proves_little():
    verdict = verify(net(), lambda model, batch: F.relu(model(batch[0]) - 100).mean(), classes())
    assert verdict.ok and "zero" in verdict.notes[0] and verdict.max_relative_error == 0


# --- How it is told


def test_the_text_names_at_most_ten_parameters():
    verdict = verify(
        nn.Sequential(*(nn.Linear(4, 4) for _ in range(7))), lambda m, b: F.mse_loss(m(b[0]), b[0]), classes()
    )
    lines = str(verdict).splitlines()
    assert lines[0].startswith("EXACT: ") and lines[-1].strip() == "and 4 more with smaller errors"
    assert [row.error for row in verdict.worst] == sorted((row.error for row in verdict.rows), reverse=True)[:10]


def test_the_text_is_no_wider_than_100():
    class_names = ["a layer with a long name"] * 40
    verdict = Verdict(
        ok=False,
        max_relative_error=0.25,
        rows=(ParameterRow("w", (2, 3), 1.0, 0.25),),
        sizes=(),
        tolerance=1e-12,
        noise_floor=1e-16,
        dtype=torch.float64,
        precision=torch.float32,
        num_rows=16,
        causes=(Cause("coupled", " ".join(class_names)),),
        notes=(" ".join(class_names),),
    )
    assert max(map(len, str(verdict).splitlines())) <= 100
    assert "float32 on the way" in str(verdict) and "25.0 % off at worst" in verdict.headline


def test_numbers_and_lists_in_words():
    assert [number(value) for value in (0.0, 2e-16, 0.234, 38.0, math.inf, math.nan)] == [
        "0",
        "2.0e-16",
        "23.4 %",
        "38 times",
        "infinitely",
        "NaN",
    ]
    assert [join_names(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
    assert join_names(list("abcdefghij")).endswith("h and 2 more")


class TestExactBatchNorm:
    """Lock-step, in which micro-batches begin one after another and draw in turns."""

    def network(self, *more):
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), *more, nn.Linear(6, 6), nn.BatchNorm1d(6))

    def squares(self, model, batch):
        return model(batch).tanh().square().mean()

    def test_it_holds(self):
        verdict = verify(self.network(), self.squares, torch.randn(16, 4), {"batch_norm": "exact"})
        assert verdict.ok and not verdict.notes and verdict.max_relative_error < 1e-12

    def test_with_dropout_between(self):
        model = nn.Sequential(nn.Dropout(0.3), self.network(nn.Dropout(), nn.Dropout(0.1)), nn.Dropout(0.2))
        verdict = verify(model, self.squares, torch.randn(16, 4), {"batch_norm": "exact"})
        assert verdict.ok and not verdict.notes and verdict.max_relative_error < 1e-12

    def test_with_dropout_that_a_checkpoint_draws_again(self):
        model = self.network(nn.Dropout(), nn.Dropout())

        def loss_fn(model, batch):
            hidden = checkpoint(model[2:5], model[:2](batch), use_reentrant=False)
            return model[5:](hidden).tanh().square().mean()

        verdict = verify(model, loss_fn, torch.randn(16, 4), {"batch_norm": "exact"})
        assert verdict.ok and "ran in evaluation mode" in verdict.notes[0]

    def test_with_a_generator_of_the_users_own_that_all_draw_from_in_turns(self):
        generator = torch.Generator().manual_seed(1)

        def noisy(x):
            return x + torch.randn(x.shape, generator=generator).to(x)

        def loss_fn(model, batch):
            return noisy(noisy(model(noisy(batch)))).tanh().square().mean()

        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        verdict = verify(model, loss_fn, torch.randn(16, 4), {"batch_norm": "exact"})
        assert verdict.ok and not verdict.notes

    def test_what_is_wrong_besides(self):
        def total(model, batch):
            return model(batch).tanh().square().sum()

        verdict = verify(self.network(), total, torch.randn(16, 4), {"batch_norm": "exact"})
        assert causes(verdict) == ["sum"]

        def ranked(model, batch):
            return (model(batch).tanh() - model(batch).tanh().sum(0)).square().mean()

        assert causes(verify(self.network(), ranked, torch.randn(16, 4), {"batch_norm": "exact"})) == ["coupled"]

    def test_ways_that_differ_are_refused(self):
        def loss_fn(model, batch):
            return (model if float(batch[0, 0]) > 0 else model[1:])(batch).square().mean()

        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
        batch = torch.randn(16, 4)
        batch[:, 0] = torch.arange(16) - 7.5
        batch[0, 0] = 1.0
        with pytest.raises(gradfold.BatchNormError, match="diverge"):
            verify(model, loss_fn, batch, {"batch_norm": "exact"})
