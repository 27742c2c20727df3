"""The backward= seam, with the frameworks it was made for."""

from __future__ import annotations

import warnings

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error, total
from torch import nn

import gradfold


def loss_fn(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def terms_fn(model, batch):
    return {"fit": loss_fn(model, batch), "size": 0.1 * model(batch[0]).square().mean()}


def make():
    return nn.Linear(4, 1).double(), (torch.randn(33, 4).double(), torch.randn(33, 1).double())


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate", reason="accelerate comes with the dev extra")
    from accelerate.state import AcceleratorState, GradientState

    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    AcceleratorState._reset_state(reset_partial_state=True)  # singletons, which would leak into the next test
    GradientState._reset_state()


@pytest.mark.parametrize("function", [loss_fn, terms_fn])
def test_accelerate(accelerator, function):
    model, batch = make()
    expected = full_batch_gradient(model, lambda model: total(function(model, batch)))
    model = accelerator().prepare(model)
    gradfold.Accumulator(model, function, micro_batch_size=5, backward=accelerator().backward).backward(batch)
    assert relative_error(gradients(model), expected) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("function", [loss_fn, terms_fn])
def test_fabric(function):
    fabric = pytest.importorskip("lightning_fabric", reason="lightning-fabric comes with the dev extra")
    model, batch = make()
    expected = full_batch_gradient(model, lambda model: total(function(model, batch)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Fabric warns about the machine that it runs on
        runner = fabric.Fabric(accelerator="cpu", devices=1)
        wrapped = runner.setup_module(model)
    gradfold.Accumulator(wrapped, function, micro_batch_size=5, backward=runner.backward).backward(batch)
    assert relative_error(gradients(model), expected) < 1e-12


def test_an_accelerator_that_divides_a_second_time_is_refused(accelerator):
    model, batch = make()
    backward = accelerator(gradient_accumulation_steps=4).backward
    with pytest.raises(gradfold.BackwardError, match=r"by 0\.25.*gradient_accumulation_steps=1") as caught:
        gradfold.Accumulator(model, loss_fn, micro_batch_size=5, backward=backward).backward(batch)
    assert caught.value.factor == 0.25
    assert gradients(model) == {}
