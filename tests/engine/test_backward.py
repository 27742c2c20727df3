"""A backward pass: seeds in the place of divisions, and the seam for frameworks with its probe."""

from __future__ import annotations

import warnings

import pytest
import torch
from reference import assert_same_state, full_batch_gradient, gradients, relative_error, state
from torch import nn

import gradfold
from gradfold.engine.backward import BackPropagation, probe
from gradfold.errors import BackwardError, LossError

CPU = torch.device("cpu")


def leaf(value=1.0, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def test_terms_are_back_propagated_with_their_shares():
    first, second = leaf(3.0), leaf(5.0)
    BackPropagation()([(first * second, 0.25), (second**2, 0.5)])
    assert (first.grad.item(), second.grad.item()) == (0.25 * 5, 0.25 * 3 + 0.5 * 10)


def test_the_graph_has_no_operation_for_the_share():
    """A seed, not a product: the first function that back-propagates is the loss's own."""
    seen = []
    value = leaf(2.0)
    loss = value.square()
    loss.register_hook(lambda gradient: seen.append(gradient.item()))
    BackPropagation()([(loss, 0.125)])
    assert seen == [0.125] and value.grad.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_seed_has_the_dtype_of_the_loss(dtype):
    seeds = []
    back_propagate = BackPropagation(lambda loss, gradient: seeds.append(gradient))
    back_propagate([(leaf(1.0, dtype) * 2, 0.25)])
    assert seeds[0].dtype == dtype and seeds[0].dim() == 0 and seeds[0].item() == 0.25


def test_every_backward_pass_has_a_seed_with_memory_of_its_own():
    seeds = []
    back_propagate = BackPropagation(lambda loss, gradient: seeds.append(gradient))
    for share, dtype in ((0.25, torch.float64), (0.5, torch.float64), (0.25, torch.float64), (0.25, torch.float32)):
        back_propagate([(leaf(1.0, dtype) * 2, share)])
    assert len({seed.data_ptr() for seed in seeds}) == 4
    assert [seed.dtype for seed in seeds] == [torch.float64] * 3 + [torch.float32]
    assert [seed.item() for seed in seeds] == [0.25, 0.5, 0.25, 0.25]


def test_terms_without_a_graph_are_left_out():
    value = leaf(3.0)
    BackPropagation()([(torch.tensor(7.0), 0.5), (value * 2, 0.5)])
    assert value.grad.item() == 1.0


def test_no_graph_at_all_is_refused_before_anything_runs():
    ran = []
    for backward in (None, lambda loss, gradient: ran.append(1)):
        with pytest.raises(LossError, match=r"does not require grad.*frozen parameters"):
            BackPropagation(backward)([(torch.tensor(7.0), 0.5)])
    assert not ran


@pytest.mark.parametrize("shares", [(0.25, 0.75), (1 / 3, 1 / 7)])
def test_a_framework_gets_one_loss_for_several_terms(shares):
    calls = []

    def backward(loss, *, gradient):
        calls.append((loss.shape, gradient.item()))
        loss.backward(gradient=gradient)

    ours, theirs = leaf(3.0), leaf(3.0)
    BackPropagation(backward)([(ours**2, shares[0]), (ours**3, shares[1])])
    (shares[0] * theirs**2 + shares[1] * theirs**3).backward()
    assert ours.grad.item() == pytest.approx(theirs.grad.item(), rel=1e-15)
    assert calls == [(torch.Size([]), 1.0)]


def test_a_gradient_that_is_the_seed_itself_may_be_changed_by_the_user():
    weight = leaf(3.0)
    back_propagate = BackPropagation()
    back_propagate([(weight, 0.25)])
    weight.grad.mul_(100)
    weight.grad = None
    back_propagate([(weight, 0.25)])
    assert weight.grad.item() == 0.25


def test_a_share_that_a_low_precision_loss_rounds_is_said():
    with pytest.warns(RuntimeWarning, match=r"torch\.bfloat16.*rounded.*losses\.float\(\)\.mean\(\)"):
        BackPropagation()([(leaf(1.0, torch.bfloat16) * 2, 1 / 3)])


@pytest.mark.parametrize("share", [1.0, 0.5, 2.0**-7])
def test_a_share_that_is_exact_in_a_low_precision_loss_is_taken_in_silence(share):
    BackPropagation()([(leaf(1.0, torch.bfloat16) * 2, share)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_share_of_a_loss_of_at_least_float32_is_taken_in_silence(dtype):
    BackPropagation()([(leaf(1.0, dtype) * 2, 1 / 3)])


def test_the_warning_is_shown_once_by_default():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            BackPropagation()([(leaf(1.0, torch.float16) * 2, 1 / 3)])
    assert len(caught) == 1


def plain(loss, *, gradient):
    loss.backward(gradient=gradient)


def by_position(loss, gradient):
    loss.backward(gradient)


class Runner:
    def backward(self, loss, **options):
        loss.backward(**options)


@pytest.mark.parametrize("backward", [plain, by_position, Runner().backward, torch.Tensor.backward])
def test_what_leaves_the_scale_alone_passes_the_probe(backward):
    probe(backward, CPU)


def test_the_probe_works_where_gradients_are_off():
    with torch.no_grad():
        probe(plain, CPU)


@pytest.mark.parametrize("factor", [0.25, 0.2, 2.0, -1.0, 65536.0, 0.0])
def test_what_scales_gradients_is_refused_with_the_factor(factor):
    with pytest.raises(BackwardError, match=rf"multiplies gradients by {factor:g}") as caught:
        probe(lambda loss, gradient: (loss * factor).backward(gradient=gradient), CPU)
    assert caught.value.factor == pytest.approx(factor, rel=1e-6)


def test_what_divides_by_the_number_of_micro_batches_is_told_where_to_set_it():
    with pytest.raises(BackwardError, match=r"gradient_accumulation_steps=1") as caught:
        probe(lambda loss, gradient: (loss / 4).backward(gradient=gradient), CPU)
    assert caught.value.factor == 0.25


def test_what_does_nothing_is_refused():
    with pytest.raises(BackwardError, match="did not back-propagate") as caught:
        probe(lambda loss, gradient: None, CPU)
    assert caught.value.factor == 0


def test_what_ignores_the_seed_is_refused():
    with pytest.raises(BackwardError, match="gradient"):
        probe(lambda loss, **_: loss.backward(), CPU)


def test_what_takes_no_seed_is_refused_with_what_to_write():
    with pytest.raises(BackwardError, match="gradient="):
        probe(lambda loss: loss.backward(), CPU)


def test_an_error_inside_of_a_framework_is_its_own():
    def broken(loss, *, gradient):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        probe(broken, CPU)


def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def make():
    return nn.Linear(2, 1).double(), (torch.randn(7, 2).double(), torch.randn(7, 1).double() + 1e4)


@pytest.mark.parametrize("terms", [False, True])
def test_a_window_through_a_framework_has_the_gradient_of_the_full_batch(terms):
    model, batch = make()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch) * (2 if terms else 1))

    def function(model, batch):
        loss = loss_fn(model, batch)
        return {"a": loss, "b": loss} if terms else loss

    gradfold.Accumulator(model, function, micro_batch_size=2, backward=plain).backward(batch)
    assert relative_error(gradients(model), expected) < 1e-12


@pytest.mark.parametrize("where", ["accumulator", "windows"])
def test_a_framework_that_scales_is_refused_before_the_first_forward(where):
    model, batch = make()
    loss_fn(model, batch).backward()
    before, ran = state(model), []

    def dividing(loss, *, gradient):
        (loss / 4).backward(gradient=gradient)

    with pytest.raises(BackwardError):
        if where == "accumulator":
            gradfold.Accumulator(model, lambda *_: ran.append(1), backward=dividing).backward(batch)
        else:
            next(iter(gradfold.windows([batch], 2, model=model, backward=dividing)))
    assert not ran
    assert_same_state(state(model), before)


def test_the_probe_runs_once_per_accumulator():
    model, batch = make()
    calls = []

    def counted(loss, *, gradient):
        calls.append(loss.item())
        loss.backward(gradient=gradient)

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, backward=counted, self_check=False)
    accumulator.backward(batch)
    accumulator.backward(batch)
    assert len(calls) == 1 + 2 + 2 and calls[0] == 1.0
