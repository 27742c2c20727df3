"""A ledger tells what was done to gradients: nothing, zeroing, scaling, rewriting."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from gradfold.doctor.gradient_state import GradientProvenance


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1, bias=False))


@pytest.fixture
def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture
def ledger(model, optimizer):
    ledger = GradientProvenance(weakref.ref(optimizer), 0)
    model(torch.ones(5, 3)).square().mean().backward()
    ledger.remember()
    ledger.remember_parameters()
    return ledger


def each(model, action):
    for parameter in model.parameters():
        action(parameter)


def none(parameter):
    parameter.grad = None


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (lambda model: None, "none"),
        (lambda model: model.zero_grad(), "cleared"),
        (lambda model: model.zero_grad(set_to_none=False), "cleared"),
        (lambda model: each(model, none), "cleared"),
        (lambda model: torch._foreach_zero_([p.grad for p in model.parameters()]), "cleared"),
        (lambda model: each(model, lambda p: p.grad.div_(5)), "rescaled"),
        (lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3), "rewritten"),
        (lambda model: model[1].zero_grad(), "rewritten"),
        (lambda model: each(model, lambda p: p.grad.add_(1)), "rewritten"),
        (lambda model: each(model, lambda p: setattr(p, "grad", p.grad.clone())), "none"),
    ],
)
def test_what_was_done(model, ledger, action, kind):
    action(model)
    change = ledger.change()
    assert change.kind == kind
    assert change.ratio == pytest.approx(0.2 if kind == "rescaled" else 1.0)


def test_parameters_moved_by_hand(model, ledger):
    assert not ledger.parameters_moved()
    with torch.no_grad():
        model[0].weight.sub_(0.1)
    assert ledger.parameters_moved()
    ledger.remember_parameters()
    model[0].weight.data += 1  # which no version counter tells of
    assert ledger.parameters_moved()


def test_an_optimizer_that_is_gone(ledger, optimizer, model):
    del optimizer
    assert ledger.change().kind in ("none", "cleared")
