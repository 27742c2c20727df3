"""A loss: what loss_fn may return, what is refused, and how losses and metrics of a window are combined."""

from __future__ import annotations

import functools
import math
import textwrap
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.errors import LossError, NonFiniteLossError, OptionError

F = nn.functional


def make(rows=7):
    model = nn.Linear(2, 1).double()
    return model, (torch.randn(rows, 2).double() + 1e4, torch.randn(rows, 1).double())


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


class Dice(nn.Module):
    """A criterion of a library."""

    def forward(self, input: torch.Tensor, target: torch.Tensor):
        return 1 - (input * target).mean()


class Own(nn.CrossEntropyLoss):
    """One that runs the model."""

    def forward(self, model, batch):
        return super().forward(model(batch[0]), batch[1])


def with_model(function):
    """A decorator that adds an argument to what it wraps."""

    @functools.wraps(function)
    def wrapper(model, batch):
        return function(model(batch[0]) - batch[1])

    return wrapper


@pytest.mark.parametrize(
    ("criterion", "shown"),
    [
        (nn.CrossEntropyLoss(), r"CrossEntropyLoss\(input, target\)"),
        (nn.MSELoss(reduction="sum"), r"MSELoss\(input, target\)"),
        (F.cross_entropy, r"cross_entropy\(input, target, weight, "),
        (functools.partial(F.mse_loss, reduction="sum"), r"partial\(input, target, "),
        (nn.TripletMarginLoss(), r"TripletMarginLoss\(anchor, positive, negative\)"),
        (Dice(), r"Dice\(input, target\)"),
        (gradfold.losses.info_nce, r"info_nce\(queries, keys, temperature"),
        (lambda batch: batch.mean(), r"<lambda>\(batch\)"),
        (lambda model, batch, *, epoch: 0, r"<lambda>\(model, batch, epoch\)"),
        (lambda: 0, r"<lambda>\(\)"),
    ],
)
def test_what_is_not_a_function_of_model_and_batch_is_refused_with_one_that_is(criterion, shown):
    with pytest.raises(OptionError, match=rf"loss_fn is {shown}.*called as loss_fn\(model, batch\)") as caught:
        gradfold.Accumulator(nn.Linear(2, 1), criterion)
    _, *lines = str(caught.value).splitlines()
    scope = {"criterion": F.mse_loss}
    exec(textwrap.dedent("\n".join(lines)), scope)
    model, batch = make()
    gradfold.Accumulator(model, scope["loss_fn"], micro_batch_size=2).backward(batch)
    found = gradients(model)
    assert relative_error(found, full_batch_gradient(model, lambda model: mse(model, batch))) < 1e-12


@pytest.mark.parametrize(
    "loss_fn",
    [
        mse,
        Own(),
        functools.partial(lambda scale, model, batch: scale * mse(model, batch), 0.5),
        lambda *args: mse(*args),
        lambda model, batch, weight=1.0: weight * mse(model, batch),
        with_model(lambda difference: difference.square().mean()),
        SimpleNamespace(loss=mse).loss,
        max,  # a builtin says nothing
    ],
)
def test_what_can_be_called_with_model_and_batch_is_taken(loss_fn):
    gradfold.Accumulator(nn.Linear(2, 1), loss_fn)


def test_the_phases_of_a_two_phase_loss_are_looked_at_too():
    with pytest.raises(OptionError, match=r"^loss is CrossEntropyLoss\(input, target\).*loss\(model, statistics\)\.$"):
        gradfold.TwoPhaseLoss(lambda model, batch: model(batch[0]), nn.CrossEntropyLoss())
    with pytest.raises(OptionError, match=r"^statistic is <lambda>\(model\)"):
        gradfold.TwoPhaseLoss(lambda model: model, lambda model, statistics: 0)


def run(model, loss_fn, batch, size=2, **options):
    # Without the self-check, since many of these loss functions count their calls.
    return gradfold.Accumulator(model, loss_fn, micro_batch_size=size, self_check=False, **options).backward(batch)


NOT_A_LOSS = {
    "text": ("text", ["a str", "0-d tensor", "dict of metrics"]),
    "None": (None, ["a NoneType"]),
    "a number": (1.5, ["a float"]),
    "a list": ([torch.tensor(1.0)], ["a list"]),
    "an empty dict": ({}, ["a dict"]),
    "a dict of numbers": ({"a": 1.0}, ["a dict"]),
    "a pair without metrics": ((torch.tensor(1.0), None), ["a tuple"]),
    "a pair of tensors": ((torch.tensor(1.0), torch.tensor(2.0)), ["a tuple"]),
    "three": ((torch.tensor(1.0), {}, {}), ["a tuple"]),
    "a model's output": (SimpleNamespace(loss=torch.tensor(1.0)), ["a SimpleNamespace", "Return output.loss"]),
    "a model's output that is a mapping": (
        {"loss": torch.tensor(1.0), "logits": torch.ones(2)},
        ["a dict", "Return output.loss"],
    ),
    "rows": (torch.ones(2, requires_grad=True), ["'loss'", "(2,)", "reduction='mean'", "loss.mean()"]),
    "one element": (torch.ones(1, requires_grad=True), ["(1,)"]),
    "whole": (torch.tensor(3), ["torch.int64"]),
    "truth": (torch.tensor(True), ["torch.bool"]),
    "complex": (torch.tensor(1j), ["torch.complex64"]),
    "a term with rows": ({"a": torch.tensor(1.0), "b": torch.ones(2, 3)}, ["'b'", "(2, 3)"]),
    "rows beside metrics": ((torch.ones(2), {"m": 1.0}), ["'loss'", "(2,)"]),
}


@pytest.mark.parametrize("output, words", NOT_A_LOSS.values(), ids=NOT_A_LOSS.keys())
def test_what_is_no_loss_is_refused_by_what_it_is(output, words):
    model, batch = make()
    with pytest.raises(LossError) as caught:
        run(model, lambda model, batch: output, batch)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert gradients(model) == {}


@pytest.mark.parametrize("output", ["text", {"a": 1.0}, [torch.tensor(1.0)]], ids=repr)
def test_what_has_no_loss_in_it_gets_no_hint_to_return_that(output):
    model, batch = make()
    with pytest.raises(LossError) as caught:
        run(model, lambda model, batch: output, batch)
    assert "output" not in str(caught.value)


@pytest.mark.parametrize("wrap", [dict, UserDict])
def test_terms_may_come_in_any_mapping(wrap):
    model, batch = make()
    result = run(model, lambda model, batch: wrap({"a": mse(model, batch)}), batch)
    assert result.loss.item() == pytest.approx(mse(model, batch).item(), rel=1e-12)


class TestTerms:
    """Each term has a denominator of its own; the loss is their plain sum."""

    def loss_fn(self, model, batch):
        inputs, targets, mask = batch
        errors = (model(inputs) - targets).square().squeeze(-1)
        fit = (errors * mask).sum() / mask.sum()  # NaN where the mask is empty
        return {"fit": fit, "size": model(inputs).square().mean()}

    weight = {"fit": lambda batch: batch[2].sum(), "size": "samples"}  # noqa: RUF012

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(mask=st.lists(st.booleans(), min_size=1, max_size=9).filter(any), size=st.integers(1, 4))
    def test_have_the_gradient_and_the_means_of_the_full_batch(self, mask, size):
        model, (inputs, targets) = make(len(mask))
        batch = (inputs, targets, torch.tensor(mask).double())
        expected = full_batch_gradient(model, lambda model: sum(self.loss_fn(model, batch).values()))
        result = run(model, self.loss_fn, batch, size, weight=self.weight)
        assert relative_error(gradients(model), expected) < 1e-12
        terms = self.loss_fn(model, batch)
        assert result.loss.item() == pytest.approx(sum(terms.values()).item(), rel=1e-12)
        assert set(result.metrics) == {"fit", "size"}
        for name, term in terms.items():
            assert result.metrics[name].item() == pytest.approx(term.item(), rel=1e-12)
        assert result.weight == {"fit": sum(mask), "size": len(mask)}

    def test_a_term_that_weighs_nothing_is_nan_by_itself_and_nothing_in_the_sum(self):
        model, (inputs, targets) = make(4)
        batch = (inputs, targets, torch.zeros(4).double())
        result = run(model, self.loss_fn, batch, weight=self.weight)
        assert result.metrics["fit"].isnan()
        assert result.loss.item() == pytest.approx(model(inputs).square().mean().item(), rel=1e-12)

    @pytest.mark.parametrize("order", [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]])
    def test_may_be_left_out_where_they_weigh_nothing_in_any_order(self, order):
        model, (inputs, targets) = make(4)
        batch = (inputs, targets, torch.tensor(order).double())

        def leaves_out(model, batch):
            terms = self.loss_fn(model, batch)
            return terms if batch[2].any() else {"size": terms["size"]}

        expected = full_batch_gradient(model, lambda model: sum(self.loss_fn(model, batch).values()))
        run(model, leaves_out, batch, weight=self.weight)
        assert relative_error(gradients(model), expected) < 1e-12

    def test_may_not_be_left_out_elsewhere(self):
        model, batch = make(4)
        upcoming = iter([{"a": 1, "b": 1}, {"a": 1}])
        with pytest.raises(LossError, match=r"micro-batch 1 returned the loss terms \['a'\], others \['a', 'b'\]"):
            run(model, lambda model, batch: dict.fromkeys(next(upcoming), mse(model, batch)), batch)
        assert gradients(model) == {}

    def test_may_not_appear_later(self):
        model, batch = make(4)
        upcoming = iter([{"a": 1}, {"a": 1, "b": 1}])
        with pytest.raises(LossError, match=r"micro-batch 1 returned the loss terms \['a', 'b'\], others \['a'\]"):
            run(model, lambda model, batch: dict.fromkeys(next(upcoming), mse(model, batch)), batch)

    def test_a_bare_loss_has_the_name_loss_for_its_weight_and_is_no_metric(self):
        model, batch = make()
        expected = full_batch_gradient(model, lambda model: mse(model, batch))
        result = run(model, mse, batch, weight={"loss": "samples"})
        assert relative_error(gradients(model), expected) < 1e-12
        assert not result.metrics and result.weight == {"loss": 7}

    def test_one_of_them_may_have_no_graph(self):
        model, batch = make()
        expected = full_batch_gradient(model, lambda model: mse(model, batch))
        result = run(model, lambda m, b: {"a": mse(m, b), "b": torch.tensor(2.0).double()}, batch)
        assert relative_error(gradients(model), expected) < 1e-12
        assert result.loss.item() == pytest.approx(mse(model, batch).item() + 2, rel=1e-12)

    def test_may_share_a_graph_and_even_be_the_same(self):
        model, batch = make()
        expected = full_batch_gradient(model, lambda model: 2 * mse(model, batch))
        run(model, lambda m, b: dict.fromkeys(["a", "b"], mse(m, b)), batch)
        assert relative_error(gradients(model), expected) < 1e-12

    def test_may_differ_in_dtype(self):
        model, batch = make()
        result = run(model, lambda m, b: {"a": mse(m, b), "b": mse(m, b).float()}, batch)
        assert result.loss.item() == pytest.approx(2 * mse(model, batch).item(), rel=1e-6)


def test_a_loss_that_has_no_graph_is_refused_with_where_to_look():
    model, batch = make()
    with pytest.raises(LossError, match=r"does not require grad.*torch\.no_grad\(\), \.detach\(\), \.item\(\)"):
        run(model, lambda model, batch: mse(model, batch).detach(), batch)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size, index, rows", [(2, 2, "row 4"), (3, 1, "rows 3 to 4"), (None, 0, "rows 0 to 4")])
def test_a_loss_that_is_not_finite_is_refused_with_its_facts(value, size, index, rows):
    model, (inputs, targets) = make(5)
    factor = torch.ones(5, 1).double()
    factor[4] = value
    with pytest.raises(NonFiniteLossError) as caught:
        run(model, lambda m, b: (m(b[0]).square() * b[2]).mean(), (inputs, targets, factor), size)
    error = caught.value
    assert (error.micro_batch, error.term) == (index, "loss")
    assert error.value == value or (math.isnan(error.value) and math.isnan(value))
    for word in (f"micro-batch {index} of", rows, str(value), "log(0)"):
        assert word in str(error)
    assert gradients(model) == {}


def test_the_first_micro_batch_to_blame_is_named_with_its_term():
    model, batch = make(6)
    factors = iter([(1.0, 1.0), (1.0, math.inf), (math.nan, 1.0)])

    def loss_fn(model, batch):
        a, b = next(factors)
        return {"a": mse(model, batch) * a, "b": mse(model, batch) * b}

    with pytest.raises(NonFiniteLossError, match=r"'b' is inf in micro-batch 1 of 3") as caught:
        run(model, loss_fn, batch)
    assert (caught.value.micro_batch, caught.value.term, caught.value.value) == (1, "b", math.inf)


def test_what_weighs_nothing_may_be_not_a_number():
    model, (inputs, targets) = make(6)
    mask = torch.tensor([1.0, 1, 0, 0, 1, 0]).double()

    def loss_fn(model, batch):
        errors = (model(batch[0]) - batch[1]).square().squeeze(-1)
        return (errors * batch[2]).sum() / batch[2].sum()

    batch = (inputs, targets, mask)
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    result = run(model, loss_fn, batch, weight=lambda batch: batch[2].sum())
    assert relative_error(gradients(model), expected) < 1e-12
    assert result.loss.item() == pytest.approx(loss_fn(model, batch).item(), rel=1e-12)


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_the_loss_comes_detached_in_its_own_dtype_and_at_least_float32(dtype, expected):
    model = nn.Linear(2, 1)
    result = run(model, lambda model, batch: model(batch).mean().to(dtype), torch.ones(4, 2))
    assert result.loss.dtype == expected and result.loss.dim() == 0 and not result.loss.requires_grad


class TestMetrics:
    def test_numbers_are_averaged_by_weight_whatever_their_kind(self):
        model, batch = make(5)  # micro-batches of 2, 2 and 1 rows
        values = iter([1.0, 3.0, 5.0])

        def loss_fn(model, batch):
            value = next(values)
            metrics = {
                "float": value,
                "int": int(value),
                "bool": value > 2,
                "tensor": torch.tensor(value),
                "long": torch.tensor(int(value)),
                "half": torch.tensor(value, dtype=torch.float16),
                "truth": torch.tensor(value > 2),
                "double": torch.tensor(value).double(),
                "numpy": np.float64(value),
            }
            return mse(model, batch), metrics

        metrics = run(model, loss_fn, batch).metrics
        for name, value in metrics.items():
            expected = (0 * 2 + 1 * 2 + 1) / 5 if name in ("bool", "truth") else (1 * 2 + 3 * 2 + 5) / 5
            assert value.item() == pytest.approx(expected, rel=1e-6), name
            assert value.dim() == 0 and value.dtype.is_floating_point
        assert len(metrics) == 9 and metrics["double"].dtype == torch.float64

    def test_numpy_numbers_of_any_dtype_are_numbers(self):
        model, batch = make(4)
        metrics = {"a": np.float32(0.5), "b": np.int64(3)}
        found = run(model, lambda m, b: (mse(m, b), metrics), batch).metrics
        assert (found["a"].item(), found["b"].item()) == (0.5, 3)

    def test_take_the_weight_of_the_loss_or_their_own(self):
        model, batch = make(3)
        values = torch.tensor([1.0, 2.0, 4.0]).double()

        def loss_fn(model, batch):
            return mse(model, batch), {"m": batch[2].mean(), "n": batch[2].mean()}

        batch = (*batch, values)
        metrics = run(model, loss_fn, batch, 1, weight=lambda batch: batch[2]).metrics
        assert metrics["m"].item() == pytest.approx(21 / 7)
        metrics = run(model, loss_fn, batch, 1, weight={"loss": "samples", "m": lambda batch: batch[2]}).metrics
        assert metrics["m"].item() == pytest.approx(21 / 7) and metrics["n"].item() == pytest.approx(7 / 3)

    def test_without_a_weight_of_their_own_take_that_of_a_bare_loss(self):
        model, batch = make(3)
        batch = (*batch, torch.tensor([1.0, 2.0, 4.0]).double())
        weight = {"loss": lambda batch: batch[2]}
        metrics = run(model, lambda m, b: (mse(m, b), {"m": b[2].mean()}), batch, 1, weight=weight).metrics
        assert metrics["m"].item() == pytest.approx(21 / 7)

    def test_rows_come_back_in_the_batch_s_own_order_though_idle_parts_run_last(self):
        model, batch = make(7)
        order = torch.arange(7)

        def loss_fn(model, batch):
            return mse(model, batch), {"rows": batch[2], "wide": batch[2][:, None] * torch.ones(1, 3)}

        weight = iter([0, 1, 0, 1])
        metrics = run(model, loss_fn, (*batch, order), weight=lambda batch: next(weight)).metrics
        assert torch.equal(metrics["rows"], order)
        assert torch.equal(metrics["wide"], order[:, None] * torch.ones(1, 3))

    def test_are_detached(self):
        model, batch = make(4)
        metrics = run(model, lambda m, b: (mse(m, b), {"a": mse(m, b), "rows": m(b[0])}), batch).metrics
        assert not any(value.requires_grad for value in metrics.values())

    def test_leave_out_what_weighs_nothing(self):
        model, batch = make(4)
        weight, values = iter([0, 1]), iter([3.0, math.nan])  # the idle micro-batch runs last
        found = run(model, lambda m, b: (mse(m, b), {"a": next(values)}), batch, weight=lambda batch: next(weight))
        assert found.metrics["a"].item() == 3.0

    def test_that_weigh_nothing_are_not_a_number(self):
        model, batch = make(4)
        weight = {"loss": "samples", "m": lambda batch: 0}
        assert run(model, lambda m, b: (mse(m, b), {"m": 1.0}), batch, weight=weight).metrics["m"].isnan()

    def test_may_be_given_by_some_micro_batches_only(self):
        model, batch = make(6)
        values = iter([{"a": 1.0}, {}, {"a": 4.0}])
        assert run(model, lambda m, b: (mse(m, b), next(values)), batch).metrics["a"].item() == 2.5

    def test_may_be_missing_from_a_micro_batch_that_weighs_nothing(self):
        model, batch = make(6)
        weight, outputs = iter([1, 0, 1]), iter([{"a": 1.0}, {"a": 2.0}, None])

        def loss_fn(model, batch):
            metrics = next(outputs)
            return mse(model, batch) if metrics is None else (mse(model, batch), metrics)

        assert run(model, loss_fn, batch, weight=lambda batch: next(weight)).metrics["a"].item() == 1.5

    def test_an_empty_dict_of_metrics_is_none(self):
        model, batch = make(4)
        assert not run(model, lambda m, b: (mse(m, b), {}), batch).metrics

    @pytest.mark.parametrize(
        "value, words",
        [
            ("text", ["'m'", "a str", "tensor or a number"]),
            (None, ["NoneType"]),
            ([1.0, 2.0], ["a list"]),
            (torch.ones(3), ["(3,)", "2 rows", "0-d", "one entry per row"]),
            (torch.ones(1), ["(1,)", "2 rows"]),
            (torch.ones(0), ["(0,)"]),
        ],
        ids=repr,
    )
    def test_that_cannot_be_combined_are_refused_by_name_and_shape(self, value, words):
        model, batch = make(4)
        with pytest.raises(LossError) as caught:
            run(model, lambda m, b: (mse(m, b), {"m": value}), batch)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert gradients(model) == {}

    @pytest.mark.parametrize(
        "values",
        [
            [torch.tensor(1.0), torch.ones(2)],
            [torch.ones(2), torch.tensor(1.0)],
            [torch.ones(2, 3), torch.ones(2, 4)],
        ],
        ids=["0-d, then rows", "rows, then 0-d", "another width"],
    )
    def test_that_change_their_shape_are_refused_by_name(self, values):
        model, batch = make(4)
        upcoming = iter(values)
        with pytest.raises(LossError, match="'m'"):
            run(model, lambda m, b: (mse(m, b), {"m": next(upcoming)}), batch)

    def test_rows_that_some_micro_batches_do_not_give_are_refused(self):
        model, batch = make(4)
        upcoming = iter([{"m": torch.ones(2)}, {}])
        with pytest.raises(LossError, match=r"'m' has rows, but only 1 of 2 micro-batches"):
            run(model, lambda m, b: (mse(m, b), next(upcoming)), batch)

    @pytest.mark.parametrize("terms", [["loss"], ["a", "loss"]])
    def test_that_have_the_name_of_a_term_are_refused(self, terms):
        model, batch = make(4)

        def loss_fn(model, batch):
            loss = mse(model, batch)
            return (loss if terms == ["loss"] else dict.fromkeys(terms, loss)), {"loss": 1.0}

        with pytest.raises(LossError, match="'loss' is both a loss term and a metric"):
            run(model, loss_fn, batch)
        assert gradients(model) == {}

    @pytest.mark.filterwarnings("ignore:weight= is 0")
    def test_a_whole_window_that_weighs_nothing_has_none(self):
        model, batch = make(4)
        result = run(model, lambda m, b: (mse(m, b), {"m": 1.0}), batch, weight=lambda batch: 0)
        assert result.loss.isnan() and not result.metrics
