"""Backward passes of which a part ignores the gradient that arrives: affine in grad_output, so no weight reaches it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.errors import NotDecomposableError


class Attached(torch.autograd.Function):
    """A loss that enters in the backward pass alone, as in the mixture-of-experts models of DeepSeek and Megatron."""

    @staticmethod
    def forward(ctx, inputs, loss):
        return inputs

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, torch.ones((), dtype=grad_output.dtype)


class Rescaled(torch.autograd.Function):
    """The same with its share of the gradient that arrives: right."""

    @staticmethod
    def forward(ctx, inputs, loss):
        return inputs.clone()

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, grad_output.sum()


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts, self.head = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 3)

    def forward(self, inputs):
        gates = self.gate(inputs).softmax(1)
        balance = 0.3 * gates.square().sum(1).mean()  # a mean over rows: it could be accumulated
        return self.head(Attached.apply(gates * self.experts(inputs), balance))


def attached(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def inner_backward(model, batch):
    (0.1 * model.head.weight.square().sum()).backward()
    return F.cross_entropy(model.head(model.experts(batch[0])), batch[1])


class Noted(torch.autograd.Function):
    """Adds to a gradient by hand, on the way back."""

    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad_output):
        (weight,) = ctx.saved_tensors
        return grad_output + 0.1 * weight  # weight decay where it does not belong


def decayed(model, batch):
    return F.cross_entropy(F.linear(model.experts(batch[0]), Noted.apply(model.head.weight)), batch[1])


def batch_of(num_rows, dtype):
    torch.manual_seed(1)
    return torch.randn(num_rows, 5, dtype=dtype), torch.randint(0, 3, (num_rows,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("loss_fn", [attached, inner_backward, decayed])
def test_a_part_that_ignores_grad_output_is_proof(loss_fn, size, dtype):
    model = Experts().to(dtype)
    with pytest.raises(NotDecomposableError, match=r"grad_output.*in a part of the gradient.*of its own") as caught:
        gradfold.Accumulator(model, loss_fn, micro_batch_size=size).backward(batch_of(48, dtype))
    assert caught.value.cause == "grad_output" and not gradients(model)


def test_the_remedy_is_a_term_of_its_own():
    class Returned(Experts):
        def forward(self, inputs):
            gates = self.gate(inputs).softmax(1)
            return self.head(gates * self.experts(inputs)), 0.3 * gates.square().sum(1).mean()

    def loss_fn(model, batch):
        logits, balance = model(batch[0])
        return {"classes": F.cross_entropy(logits, batch[1]), "balance": balance}

    model, batch = Returned().double(), batch_of(12, torch.float64)
    whole = Experts().double()
    whole.load_state_dict(model.state_dict())
    expected = full_batch_gradient(whole, lambda model: attached(model, batch))
    gradfold.Accumulator(model, loss_fn, micro_batch_size=4).backward(batch)
    assert relative_error(gradients(model), expected) <= 1e-12


def linear(model, batch):
    gates = model.gate(batch[0]).softmax(1)
    hidden = Rescaled.apply(gates * model.experts(batch[0]), gates.square().mean())
    return F.cross_entropy(model.head(hidden), batch[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_backward_pass_that_is_linear_in_grad_output_is_no_offense(dtype):
    """The same on every row, so that each micro-batch has the same share: only the factor is looked at."""
    model, (inputs, labels) = Experts().to(dtype), batch_of(4, dtype)
    batch = inputs.repeat(4, 1), labels.repeat(4)
    expected = full_batch_gradient(model, lambda model: linear(model, batch))
    gradfold.Accumulator(model, linear, micro_batch_size=4, self_check=False).backward(batch)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert relative_error(gradients(model), expected) <= tolerance


def test_a_loss_in_bfloat16_rounds_grad_output_which_is_noise():
    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(batch[0])
        return (outputs - batch[1].to(torch.bfloat16)).square().mean()

    model = nn.Linear(5, 3)
    batch = torch.randn(20, 5), torch.randn(20, 3)
    with pytest.warns(RuntimeWarning, match="the loss is torch.bfloat16"):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=3).backward(batch)
