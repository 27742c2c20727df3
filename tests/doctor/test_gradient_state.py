"""Gradient provenance tells what was done to gradients: nothing, zeroing, scaling, rewriting."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from gradfold.doctor.gradient_state import CLEARED, REWRITTEN, UNCHANGED, GradientProvenance


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1, bias=False))


@pytest.fixture
def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture
def provenance(model, optimizer):
    provenance = GradientProvenance(weakref.ref(optimizer), type(optimizer).__name__, 0)
    model(torch.ones(5, 3)).square().mean().backward()
    provenance.remember()
    provenance.remember_parameters()
    return provenance


def each(model, action):
    for parameter in model.parameters():
        action(parameter)


def none(parameter):
    parameter.grad = None


@pytest.mark.parametrize(
    ("action", "ratio"),
    [
        (lambda model: None, UNCHANGED),
        (lambda model: model.zero_grad(), CLEARED),
        (lambda model: model.zero_grad(set_to_none=False), CLEARED),
        (lambda model: each(model, none), CLEARED),
        (lambda model: torch._foreach_zero_([p.grad for p in model.parameters()]), CLEARED),
        (lambda model: each(model, lambda p: p.grad.div_(5)), 0.2),
        (lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3), REWRITTEN),
        (lambda model: model[1].zero_grad(), REWRITTEN),
        (lambda model: each(model, lambda p: p.grad.add_(1)), REWRITTEN),
        (lambda model: each(model, lambda p: setattr(p, "grad", p.grad.clone())), UNCHANGED),
    ],
)
def test_what_was_done(model, provenance, action, ratio):
    action(model)
    assert provenance.change() == pytest.approx(ratio, nan_ok=True)


def test_parameters_changed_by_hand(model, provenance):
    assert not provenance.parameters_changed()
    with torch.no_grad():
        model[0].weight.sub_(0.1)
    assert provenance.parameters_changed()
    provenance.remember_parameters()
    model[0].weight.data += 1  # which no version counter tells of
    assert provenance.parameters_changed()


def test_an_optimizer_that_is_gone(provenance, optimizer, model):
    del optimizer
    assert provenance.change() in (UNCHANGED, CLEARED)
