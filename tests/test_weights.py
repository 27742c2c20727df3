"""A weight: what it may be, what is refused, and that the denominator is that of the whole window."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import full_batch_gradient, gradients, relative_error
from torch import Tensor, nn

import gradfold
from gradfold.batch.split import split_rows
from gradfold.errors import WeightError
from gradfold.weights import WindowWeights, check_option, weigh

F = nn.functional
LABELS = torch.tensor([[5, 7, -100], [2, -100, -100]])


class Tokens(NamedTuple):
    ids: Tensor
    labels: Tensor


@dataclasses.dataclass
class Fields:
    labels: Tensor


class TestTokenCount:
    @pytest.mark.parametrize(
        "labels, batch",
        [
            ("labels", {"labels": LABELS}),
            (1, (None, LABELS)),
            (-1, [None, LABELS]),
            (0, {0: LABELS}),
            ("labels", Tokens(LABELS, LABELS)),
            ("labels", Fields(LABELS)),
            (lambda batch: batch["deep"][0], {"deep": [LABELS]}),
            (lambda batch: batch, LABELS),
        ],
    )
    def test_counts_the_labels_by_key_index_attribute_or_callable(self, labels, batch):
        count = gradfold.token_count(labels)(batch)
        assert isinstance(count, Tensor) and count.dim() == 0 and count.item() == 3

    def test_shift_leaves_out_the_first_label_of_each_row(self):
        assert gradfold.token_count("labels", shift=True)({"labels": LABELS}).item() == 1

    def test_ignore_index_is_the_label_that_does_not_count(self):
        assert gradfold.token_count("labels", ignore_index=7)({"labels": LABELS}).item() == 5

    @pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 2), (4, 2, 2, 2)])
    def test_counts_what_cross_entropy_divides_by(self, shape):
        labels = torch.randint(0, 3, shape)
        labels[torch.rand(shape) < 0.4] = -100
        logits = torch.randn(shape[0], 3, *shape[1:])
        total = F.cross_entropy(logits, labels, reduction="sum")
        mean = F.cross_entropy(logits, labels)
        assert gradfold.token_count("y")({"y": labels}).item() == pytest.approx((total / mean).item(), rel=1e-5)

    @pytest.mark.parametrize(
        "labels, batch, words",
        [
            ("label", {"labels": LABELS, "ids": LABELS}, ["token_count('label')", "['ids', 'labels']", "callable"]),
            ("labels", (LABELS, LABELS), ["token_count('labels')", "tuple"]),
            (2, (LABELS, LABELS), ["token_count(2)", "tuple", "index"]),
            (1, {"labels": LABELS}, ["token_count(1)", "['labels']"]),
            ("labels", LABELS, ["Tensor"]),
            ("labels", {"labels": [[1, 2]]}, ["labels are a list", "expected a tensor"]),
            ("labels", {"labels": None}, ["labels are a NoneType"]),
            ("count", (LABELS,), ["expected a tensor"]),
        ],
    )
    def test_labels_that_are_not_there_are_refused_by_what_is(self, labels, batch, words):
        with pytest.raises(WeightError) as caught:
            gradfold.token_count(labels)(batch)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    def test_an_index_into_a_batch_that_is_one_tensor_is_refused(self):
        """It would take one row for the labels of all, and weigh wrongly in silence."""
        with pytest.raises(WeightError, match="Tensor"):
            gradfold.token_count(0)(LABELS)

    def test_an_error_in_the_user_s_callable_is_the_user_s(self):
        with pytest.raises(ZeroDivisionError):
            gradfold.token_count(lambda batch: 1 / 0)({})

    @pytest.mark.parametrize("shift", [False, True])
    def test_makes_a_token_mean_exact_with_ragged_counts(self, shift):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 6)).double()
        ids, labels = torch.randint(0, 6, (7, 5)), torch.randint(0, 6, (7, 5))
        for row in range(7):
            labels[row, row - 1 :] = -100
        labels[3] = -100

        def loss_fn(model, batch):
            logits, targets = model(batch["ids"]), batch["labels"]
            if shift:
                logits, targets = logits[:, :-1], targets[:, 1:]
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        batch = {"ids": ids, "labels": labels}
        expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
        weight = gradfold.token_count("labels", shift=shift)
        result = gradfold.Accumulator(model, loss_fn, micro_batch_size=1, weight=weight).backward(batch)
        assert relative_error(gradients(model), expected) < 1e-12
        assert result.loss.item() == pytest.approx(loss_fn(model, batch).item(), rel=1e-12)
        assert result.weight == (labels[:, 1:] if shift else labels).ne(-100).sum().item()


def shares(weight, rows=6, size=2) -> WindowWeights:
    return weigh(weight, split_rows(torch.arange(float(rows)), size))


KINDS = {
    "int": 3,
    "float": 3.0,
    "bool": True,
    "Fraction": Fraction(3, 2),
    "Decimal": Decimal("1.5"),
    "0-d int": torch.tensor(3),
    "0-d float": torch.tensor(3.0),
    "0-d half": torch.tensor(3.0, dtype=torch.float16),
    "0-d bfloat16": torch.tensor(3.0, dtype=torch.bfloat16),
    "0-d bool": torch.tensor(True),
    "one element": torch.tensor([3.0]),
    "1 x 1": torch.tensor([[3]]),
    "with a graph": torch.tensor(3.0, requires_grad=True) * 1,
    "numpy float": np.float32(3),
    "numpy int": np.int64(3),
    "numpy bool": np.bool_(True),
    "numpy 0-d": np.array(3.0),
}


@pytest.mark.parametrize("value", KINDS.values(), ids=KINDS.keys())
def test_a_weight_may_be_any_one_number(value):
    weights = shares(lambda batch: value)
    assert weights.total() == 3 * float(value.detach() if isinstance(value, Tensor) else value)
    assert weights.of_term("loss").normalized == pytest.approx((1 / 3, 1 / 3, 1 / 3), rel=1e-15)


REFUSED = {
    "negative": (-1, ["-1", "at least 0"]),
    "negative tensor": (torch.tensor(-2.0), ["-2", "at least 0"]),
    "nan": (math.nan, ["nan", "finite"]),
    "nan tensor": (torch.tensor(math.nan), ["nan", "finite"]),
    "inf": (math.inf, ["inf", "finite"]),
    "-inf": (-math.inf, ["-inf"]),
    "numpy nan": (np.float64("nan"), ["nan"]),
    "text": ("3", ["a str", "one number", "mask.sum()"]),
    "bytes": (b"3", ["a bytes", "one number"]),
    "nothing": (None, ["NoneType"]),
    "list": ([3], ["list"]),
    "dict": ({"loss": 1}, ["dict"]),
    "complex": (1j, ["complex"]),
    "complex tensor": (torch.tensor(1j), ["Tensor"]),
    "several": (torch.ones(2), ["(2,)", "one number"]),
    "none of several": (torch.ones(0), ["(0,)"]),
    "numpy several": (np.ones(2), ["ndarray"]),
    "too large for a float": (10**400, ["one number"]),
}


@pytest.mark.parametrize("value, words", REFUSED.values(), ids=REFUSED.keys())
def test_a_weight_that_is_no_number_of_at_least_0_is_refused_by_what_it_is(value, words):
    with pytest.raises(WeightError) as caught:
        shares(lambda batch: value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_weights_whose_sum_is_no_number_are_refused():
    with pytest.raises(WeightError):
        shares(lambda batch: 1e308)


def test_the_refusal_names_the_first_bad_micro_batch_and_its_rows():
    values = iter([1.0, 2.0, torch.tensor(-3.0)])
    with pytest.raises(WeightError, match=r"micro-batch 2 \(rows 4 to 5\) is tensor\(-3\.\)"):
        shares(lambda batch: next(values))


def test_with_weights_by_name_the_refusal_names_the_right_micro_batch():
    weight = {"a": lambda batch: 1, "b": lambda batch: -1 if batch[0] >= 2 else 1}
    with pytest.raises(WeightError, match=r"micro-batch 1 \(rows 2 to 3\)"):
        shares(weight)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e9), st.integers(0, 10**6)), min_size=1, max_size=12))
def test_the_parts_of_a_window_are_the_weights_over_their_sum(values):
    upcoming = iter(values)
    weights = shares(lambda batch: next(upcoming), rows=len(values), size=1)
    total = sum(Fraction(value) for value in values)
    parts = weights.of_term("loss").normalized
    assert weights.total() == pytest.approx(float(total), rel=1e-15)
    if total == 0:
        assert parts == (0.0,) * len(values)
    else:
        assert parts == pytest.approx([float(Fraction(value) / total) for value in values], rel=1e-15)
        assert math.fsum(parts) == pytest.approx(1, rel=1e-14)
    assert weights.zero_weight == {index for index, value in enumerate(values) if value == 0}


def test_weights_of_the_same_shape_but_other_values_are_not_mixed_up():
    for factor in (1.0, 3.0):
        values = iter([factor, 1.0, 0.0])
        weights = shares(lambda batch, values=values: next(values))
        assert weights.of_term("loss").normalized == pytest.approx((factor / (factor + 1), 1 / (factor + 1), 0))
        assert weights.total() == factor + 1


def test_samples_weigh_by_rows():
    assert shares("samples", rows=5, size=2).of_term("loss").normalized == pytest.approx((0.4, 0.4, 0.2))
    assert shares("samples", rows=5, size=2).total() == 5


def test_each_weight_function_runs_once_per_micro_batch_with_its_rows():
    seen = []
    shares(lambda batch: seen.append(batch.tolist()) or 1, rows=5, size=2)
    assert seen == [[0.0, 1.0], [2.0, 3.0], [4.0]]


def test_terms_have_denominators_of_their_own_and_metrics_fall_back():
    weights = shares({"a": lambda batch: batch.sum(), "b": "samples"}, rows=4, size=2)
    assert weights.of_term("a").normalized == pytest.approx((1 / 6, 5 / 6))
    assert weights.of_term("b").normalized == (0.5, 0.5)
    assert weights.of_metric("a").normalized == weights.of_term("a").normalized
    assert weights.of_metric("unnamed").normalized == (0.5, 0.5)
    assert weights.total() == {"a": 6.0, "b": 4.0}
    single = shares(lambda batch: batch.sum(), rows=4, size=2)
    assert single.of_metric("unnamed").normalized == pytest.approx((1 / 6, 5 / 6))


def test_zero_weight_is_what_weighs_nothing_under_every_name():
    weights = shares({"a": lambda batch: batch[0], "b": lambda batch: batch[0] == 4}, rows=6, size=2)
    assert weights.zero_weight == {0}


@pytest.mark.parametrize(
    "terms, metrics, words",
    [
        (["a", "c"], [], ["['a', 'b']", "'c'"]),
        (["a"], ["m"], ["'b' has no term or metric", "['a']", "['m']"]),
        (["loss"], ["a", "b"], ["'loss'", "['a', 'b']", 'an unnamed loss is called "loss"']),
    ],
)
def test_names_that_differ_are_refused_with_both_sides(terms, metrics, words):
    model = nn.Linear(2, 1)

    def loss_fn(model, batch):
        loss = model(batch).mean()
        return (loss if terms == ["loss"] else dict.fromkeys(terms, loss)), dict.fromkeys(metrics, 1.0)

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, weight={"a": "samples", "b": "samples"})
    with pytest.raises(WeightError, match=r"weight= names \['a', 'b'\]") as caught:
        accumulator.backward(torch.zeros(4, 2))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert gradients(model) == {}


def test_a_weight_may_be_that_of_a_metric():
    model = nn.Linear(1, 1)
    accumulator = gradfold.Accumulator(
        model,
        lambda model, batch: ({"a": model(batch).mean()}, {"b": batch.mean(), "c": batch.mean()}),
        micro_batch_size=1,
        weight={"a": lambda batch: 1, "b": lambda batch: batch},
    )
    metrics = accumulator.backward(torch.tensor([[1.0], [3.0]])).metrics
    assert (metrics["b"].item(), metrics["c"].item()) == (2.5, 2.0)


@pytest.mark.parametrize("option", ["samples", len, {"loss": "samples", "b": len}, gradfold.token_count("y")])
def test_options_that_work(option):
    check_option(option)


@pytest.mark.parametrize(
    "option",
    ["tokens", 3, None, torch.tensor(3.0), np.ones(3), {"loss": "tokens"}, {"loss": 2}, ["samples"], ("loss", len)],
    ids=repr,
)
def test_options_that_are_no_weights_are_refused_with_what_to_write(option):
    with pytest.raises(WeightError, match=r'expected "samples", gradfold\.token_count'):
        check_option(option)


def test_no_weight_at_all_is_refused():
    with pytest.raises(WeightError, match="empty"):
        check_option({})


def test_unequal_weights_give_the_gradient_of_the_weighted_mean():
    model = nn.Linear(2, 1).double()
    inputs, mass = torch.randn(7, 2).double() + 1e4, torch.rand(7).double()

    def loss_fn(model, batch):
        errors = model(batch[0]).squeeze(-1).square()
        return (errors * batch[1]).sum() / batch[1].sum()

    expected = full_batch_gradient(model, lambda model: loss_fn(model, (inputs, mass)))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, weight=lambda batch: batch[1].sum())
    result = accumulator.backward((inputs, mass))
    assert relative_error(gradients(model), expected) < 1e-12
    assert result.weight == pytest.approx(mass.sum().item(), rel=1e-15)


@pytest.mark.parametrize("named", [False, True])
def test_a_window_that_weighs_nothing_leaves_no_gradient_and_runs_nothing(named):
    model, ran = nn.Linear(2, 1), []
    weight = {"a": lambda batch: 0, "b": lambda batch: 0} if named else lambda batch: 0
    accumulator = gradfold.Accumulator(model, lambda *_: ran.append(1), micro_batch_size=2, weight=weight)
    with pytest.warns(RuntimeWarning, match=r"weight= is 0 for every micro-batch"):
        result = accumulator.backward(torch.randn(5, 2))
    assert result.is_empty and result.loss.isnan() and result.num_micro_batches == 0
    assert result.weight == ({"a": 0, "b": 0} if named else 0)
    assert not ran and gradients(model) == {}


class TestWindowsThatWeighNothing:
    @staticmethod
    def accumulator(**options):
        options = {"micro_batch_size": 2, "weight": gradfold.token_count(1)} | options
        return gradfold.Accumulator(nn.Linear(3, 4), lambda m, b: F.cross_entropy(m(b[0]), b[1]), **options)

    @staticmethod
    def batch(*labels):
        torch.manual_seed(0)
        return torch.randn(len(labels), 3), torch.tensor(labels)

    def test_are_warned_of_once(self):
        accumulator = self.accumulator()
        nothing, something = self.batch(-100, -100, -100), self.batch(-100, 2, 1)
        accumulator.backward(something)
        with pytest.warns(RuntimeWarning, match=r"ignore_index=.*TrainStep skips") as seen:
            for batch in (nothing, nothing, something, nothing):
                assert accumulator.backward(batch).is_empty == (batch is nothing)
        assert len(seen) == 1 and seen[0].filename == __file__

    def test_though_a_metric_weighs_something(self):
        def loss_fn(model, batch):
            return F.cross_entropy(model(batch[0]), batch[1]), {"mean": batch[0].mean()}

        weight = {"loss": gradfold.token_count(1), "mean": "samples"}
        accumulator = gradfold.Accumulator(nn.Linear(3, 4), loss_fn, micro_batch_size=2, weight=weight)
        with pytest.warns(RuntimeWarning, match=r"weight= is 0"):
            assert accumulator.backward(self.batch(-100, -100, -100)).is_empty

    def test_not_where_what_weighed_something_was_left_out_for_a_fault(self):
        accumulator = self.accumulator(on_non_finite="skip_micro_batch", micro_batch_size=1, self_check=False)
        inputs, labels = self.batch(1, -100)
        inputs[0] = math.nan
        accumulator.backward((inputs, labels))
