"""Losses that add up: weight "sum", alone and by name, in accumulators and in loop bodies."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import full_batch_gradient, gradients, relative_error, total
from torch import nn

import gradfold
from gradfold.errors import NotDecomposableError, OptionError, WeightError, WindowError
from gradfold.weights import check_option

F = nn.functional
TOKENS = gradfold.token_count("labels")


def net(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def tokens(num_rows, length=5, ignored=0.4):
    """Sequences, and how many of their labels count in the whole batch."""
    torch.manual_seed(1)
    labels = torch.randint(0, 3, (num_rows, length))
    labels[torch.rand(num_rows, length) < ignored] = -100
    inputs = torch.randn(num_rows, length, 4).double()
    return {"x": inputs, "labels": labels, "num_items": (labels != -100).sum()}


def cut(batch, start, stop):
    return {key: value[start:stop] if value.dim() else value for key, value in batch.items()}


def dapo(model, batch):
    """A sum over tokens, divided by their number in the whole batch."""
    logits = model(batch["x"]).flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum") / batch["num_items"]


def plain_sum(model, batch):
    return model(batch["x"]).square().sum()


def token_mean(model, batch):
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["labels"].flatten())


def row_mean(model, batch):
    return model(batch["x"]).square().mean()


def own_mean(model, batch):
    """A mean over the tokens of the micro-batch, by hand."""
    logits = model(batch["x"]).flatten(0, 1)
    total = F.cross_entropy(logits, batch["labels"].flatten(), reduction="sum")
    return total / (batch["labels"] != -100).sum()


def two_terms(model, batch):
    logits = model(batch["x"])
    metrics = {"rows": logits.sum((1, 2)).detach(), "total": logits.sum().detach(), "mean": logits.mean().detach()}
    return {"kl": logits.square().sum() / batch["num_items"], "ce": token_mean(model, batch)}, metrics


def accumulated(loss_fn, batch, size, **options):
    model = net()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, **options)
    return accumulator.backward(batch), gradients(model)


def assert_law(loss_fn, batch, size, **options):
    result, found = accumulated(loss_fn, batch, size, **options)
    model = net()
    assert relative_error(found, full_batch_gradient(model, lambda model: total(loss_fn(model, batch)))) <= 1e-12
    torch.testing.assert_close(result.loss, total(loss_fn(model, batch)).detach(), rtol=1e-12, atol=1e-12)
    return result


class TestAccumulator:
    @pytest.mark.parametrize("loss_fn", [dapo, plain_sum])
    @pytest.mark.parametrize("size", [1, 2, 4, 7, None])
    def test_losses_of_micro_batches_add_up(self, loss_fn, size):
        assert assert_law(loss_fn, tokens(11), size, weight="sum").weight == 1.0

    @settings(max_examples=30, deadline=None)
    @given(st.integers(2, 9), st.integers(1, 9), st.floats(0, 0.9))
    def test_whatever_the_split(self, num_rows, size, ignored):
        batch = tokens(num_rows, ignored=ignored)
        batch["num_items"] = batch["num_items"].clamp(min=1)
        assert_law(dapo, batch, size, weight="sum", self_check=False)

    def test_by_name_beside_a_mean(self):
        batch = tokens(11)
        result = assert_law(two_terms, batch, 3, weight={"kl": "sum", "ce": TOKENS, "total": "sum"})
        terms, metrics = two_terms(net(), batch)
        for name, value in {**terms, **metrics}.items():
            torch.testing.assert_close(result.metrics[name], value.detach(), rtol=1e-12, atol=1e-12)
        assert result.weight == {"kl": 1.0, "ce": batch["num_items"].item()}

    def test_a_metric_is_a_mean_over_samples(self):
        def loss_fn(model, batch):
            return dapo(model, batch), {"rows": batch["x"].mean()}

        batch = tokens(7)
        result = assert_law(loss_fn, batch, 2, weight="sum")
        torch.testing.assert_close(result.metrics["rows"], batch["x"].mean(), rtol=1e-12, atol=1e-12)

    def test_a_window_of_micro_batches(self):
        batch = tokens(7)
        parts = [cut(batch, *bounds) for bounds in ((0, 3), (3, 4), (4, 7))]
        model = net()
        accumulator = gradfold.Accumulator(model, dapo, weight="sum")
        (window,) = gradfold.windows(parts, 3)
        accumulator.backward(window)
        assert relative_error(gradients(model), full_batch_gradient(net(), lambda model: dapo(model, batch))) <= 1e-12

    def test_exact_batch_norm(self):
        def make():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()

        inputs, targets = torch.randn(9, 4).double(), torch.randn(9, 3).double()

        def loss_fn(model, batch):
            return F.mse_loss(model(batch[0]), batch[1], reduction="sum") / 9

        model = make()
        gradfold.Accumulator(model, loss_fn, micro_batch_size=4, weight="sum", batch_norm="exact").backward(
            (inputs, targets)
        )
        expected = full_batch_gradient(make(), lambda model: loss_fn(model, (inputs, targets)))
        assert relative_error(gradients(model), expected) <= 1e-12

    def test_micro_batches_that_are_left_out_add_nothing(self):
        batch = tokens(7)
        batch["x"][2] = float("nan")
        rest = {**batch, **{key: torch.cat([batch[key][:2], batch[key][3:]]) for key in ("x", "labels")}}
        result, found = accumulated(dapo, batch, 1, weight="sum", on_non_finite="skip_micro_batch", self_check=False)
        assert relative_error(found, full_batch_gradient(net(), lambda model: dapo(model, rest))) <= 1e-12
        torch.testing.assert_close(result.loss, dapo(net(), rest).detach(), rtol=1e-12, atol=1e-12)
        assert result.weight == 1.0 and len(result.recoveries) == 1

    def test_halved_on_out_of_memory(self):
        def loss_fn(model, batch):
            if len(batch["x"]) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return dapo(model, batch)

        batch = tokens(7)
        result, found = accumulated(loss_fn, batch, None, weight="sum", self_check=False)
        assert relative_error(found, full_batch_gradient(net(), lambda model: dapo(model, batch))) <= 1e-12
        assert result.recoveries and result.weight == 1.0

    def test_a_size_found_by_itself(self):
        assert_law(dapo, tokens(12), "auto", weight="sum")

    def test_by_padded_tokens(self):
        batch = tokens(9) | {"length": torch.arange(1, 10) % 5 + 1}
        for row, length in enumerate(batch["length"].tolist()):
            batch["labels"][row, length:], batch["x"][row, length:] = -100, 0
        batch["num_items"] = (batch["labels"] != -100).sum()
        budget = gradfold.TokenBudget(12, lengths=lambda batch: batch["length"])
        assert_law(dapo, batch, None, weight="sum", batching=budget)

    def test_a_two_phase_loss_has_the_whole_batch(self):
        loss = gradfold.TwoPhaseLoss(lambda model, batch: model(batch), lambda model, outputs: outputs.square().sum())
        with pytest.raises(OptionError, match="weight= is not supported with a TwoPhaseLoss"):
            gradfold.Accumulator(net(), loss, weight="sum")

    def test_no_other_text_is_a_weight(self):
        with pytest.raises(WeightError, match='"sum"'):
            check_option("total")


class TestSelfCheck:
    @pytest.mark.parametrize("size", [1, 2, 4, 8])
    @pytest.mark.parametrize("loss_fn", [dapo, plain_sum])
    def test_settles_on_a_sum(self, loss_fn, size):
        accumulator = gradfold.Accumulator(net(), loss_fn, micro_batch_size=size, weight="sum")
        accumulator.backward(tokens(11))
        assert accumulator.state_dict()["self_check"]["settled"]

    @pytest.mark.parametrize(
        "loss_fn, weight", [(token_mean, 'token_count("labels")'), (own_mean, "labels"), (row_mean, '"samples"')]
    )
    @pytest.mark.parametrize("size", [1, 3, 6])
    def test_refuses_a_mean_and_names_its_weight(self, loss_fn, weight, size):
        accumulator = gradfold.Accumulator(net(), loss_fn, micro_batch_size=size, weight="sum")
        with pytest.raises(NotDecomposableError, match="is a mean over") as caught:
            accumulator.backward(tokens(11, ignored=0.3))
        assert caught.value.cause == "mean" and weight in caught.value.weight
        assert f"weight={caught.value.weight}" in str(caught.value)

    def test_refuses_a_mean_by_name(self):
        def loss_fn(model, batch):
            return {"kl": row_mean(model, batch), "ce": token_mean(model, batch)}

        accumulator = gradfold.Accumulator(net(), loss_fn, micro_batch_size=4, weight={"kl": "sum", "ce": TOKENS})
        with pytest.raises(NotDecomposableError, match="the loss term 'kl' is a mean over") as caught:
            accumulator.backward(tokens(11))
        assert caught.value.term == "kl" and "{..., 'kl': \"samples\"}" in str(caught.value)

    def test_a_sum_weighed_by_samples_is_told_of_both_ways_out(self):
        with pytest.raises(NotDecomposableError, match=r'weight="sum".*reduction=') as caught:
            accumulated(dapo, tokens(11), 4)
        assert caught.value.cause == "sum"

    def test_rows_that_no_label_counts_in_do_not_tell(self):
        batch = tokens(8)
        batch["labels"][:7] = -100  # of the first micro-batch only one row counts: a mean and a sum are alike
        accumulator = gradfold.Accumulator(net(), dapo, micro_batch_size=4, weight="sum")
        accumulator.backward(batch)
        assert not accumulator.state_dict()["self_check"]["settled"]

    @pytest.mark.parametrize("loss_fn, is_right", [(dapo, True), (token_mean, False), (row_mean, False)])
    def test_verify(self, loss_fn, is_right):
        accumulator = gradfold.Accumulator(net(), loss_fn, micro_batch_size=4, weight="sum")
        verdict = gradfold.verify(accumulator, tokens(11))
        assert verdict.ok == is_right
        assert [cause.name for cause in verdict.causes] == ([] if is_right else ["mean"])

    def test_plan(self):
        accumulator = gradfold.Accumulator(net(), dapo, micro_batch_size=4, weight="sum")
        assert gradfold.plan(accumulator, tokens(8), memory="1 GiB").rows


class TestLoopBody:
    @staticmethod
    def loop(loss_fn, batch, bounds, num_windows=3, weight="sum"):
        model, parts = net(), [cut(batch, *bound) for bound in bounds]
        for window in gradfold.windows(parts * num_windows, len(parts), model=model, weight=weight):
            model.zero_grad()
            for part in window:
                window.backward(loss_fn(model, part))
        return window, gradients(model)

    @pytest.mark.parametrize("loss_fn", [dapo, plain_sum, lambda *args: -dapo(*args) * 3])
    @pytest.mark.parametrize("bounds", [((0, 3), (3, 4), (4, 8)), ((0, 8),), ((0, 4), (4, 4), (4, 8))])
    def test_losses_add_up(self, loss_fn, bounds):
        batch = tokens(8)
        window, found = self.loop(loss_fn, batch, bounds)
        assert relative_error(found, full_batch_gradient(net(), lambda model: loss_fn(model, batch))) <= 1e-12
        torch.testing.assert_close(window.loss, loss_fn(net(), batch).detach(), rtol=1e-12, atol=1e-12)
        assert window.weight == 1.0

    def test_a_mean_times_its_share_is_a_sum(self):
        batch = tokens(8)

        def loss_fn(model, batch):
            return row_mean(model, batch) * len(batch["x"]) / 8

        _, found = self.loop(loss_fn, batch, ((0, 3), (3, 8)))
        assert relative_error(found, full_batch_gradient(net(), lambda model: loss_fn(model, batch))) <= 1e-12

    @pytest.mark.parametrize("loss_fn", [row_mean, token_mean, own_mean])
    def test_a_mean_is_refused(self, loss_fn):
        with pytest.raises(NotDecomposableError, match="is a mean over") as caught:
            self.loop(loss_fn, tokens(8), ((0, 3), (3, 8)))
        assert caught.value.cause == "mean"

    def test_a_sum_weighed_by_samples_is_told_of_weight_sum(self):
        with pytest.raises(NotDecomposableError, match='weight="sum"'):
            self.loop(plain_sum, tokens(8), ((0, 3), (3, 8)), weight="samples")

    def test_rows_need_not_be_known(self):
        model = net()
        parts = [[torch.randn(2, 4).double(), torch.randn(3, 4).double()], [torch.randn(1, 4).double()]]
        for window in gradfold.windows(parts, 2, model=model, weight="sum"):
            for part in window:
                window.backward(sum(model(one).square().sum() for one in part))
        expected = full_batch_gradient(net(), lambda model: sum(model(one).square().sum() for one in chain(*parts)))
        assert relative_error(gradients(model), expected) <= 1e-12

    def test_a_micro_batch_without_backward_is_an_error(self):
        (window,) = gradfold.windows([torch.ones(2, 4).double()], 1, model=net(), weight="sum")
        with pytest.raises(WindowError, match=r"without window\.backward"):
            list(window)
