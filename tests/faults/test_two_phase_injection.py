"""Faults all over a two-phase window: survived with the same gradient, or no trace at all."""

from __future__ import annotations

import pytest
import torch
from reference import assert_same_state, full_batch_gradient, gradients, relative_error, state
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradfold


class Fault(TorchDispatchMode):
    """Raises once, at the operator number `at`."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


class Encoder(nn.Module):
    """Has a buffer that every forward pass moves."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor(0.5))
        self.register_buffer("num_rows", torch.zeros(()))

    def forward(self, x):
        self.num_rows += len(x)
        return self.linear(x).tanh()


def statistic(model, batch):
    return model(batch["x"]), batch["label"]


def loss(model, statistics):
    z, label = statistics
    return gradfold.losses.info_nce(z, z.flip(0), model.scale, tile=3) + (z * label[:, None]).square().mean().sqrt()


def fresh():
    torch.manual_seed(0)
    model = Encoder().double()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    return model, {"x": torch.randn(7, 3, dtype=torch.float64), "label": torch.arange(7)}


def run(fault):
    model, batch = fresh()
    loss_fn = gradfold.TwoPhaseLoss(statistic, loss)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=3, self_check=False)
    before = state(model)
    try:
        with fault:
            return model, before, accumulator.backward(batch), None
    except BaseException as error:
        return model, before, None, error


@pytest.fixture(scope="module")
def expected():
    model, batch = fresh()
    gradient = full_batch_gradient(model, lambda model: loss(model, statistic(model, batch)))
    return {name: one + 2.0 for name, one in gradient.items()}


def num_points():
    fault = Fault(0, None)
    run(fault)
    return fault.count


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("none left"), KeyboardInterrupt()], ids=["memory", "interrupt"]
)
def test_a_fault_is_survived_or_leaves_no_trace(error, expected):
    survived = failed = 0
    step = 5 if isinstance(error, torch.OutOfMemoryError) else 11
    for at in range(1, num_points() + 1, step):
        model, before, result, raised = run(Fault(at, error))
        if result is None:
            failed += 1
            assert raised is error or isinstance(raised, gradfold.DoesNotFitError)
            assert_same_state(state(model), before)
            continue
        survived += 1
        assert isinstance(error, torch.OutOfMemoryError)
        assert relative_error(gradients(model), expected) < 1e-12
        assert float(model.num_rows) == 7
    assert failed > 4
    assert survived > 10 or isinstance(error, KeyboardInterrupt)
