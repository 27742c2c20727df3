"""Hooks on parameters: those that act on each micro-batch are refused, those that see its gradient are named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradfold.engine.model_checks import check_hooks, parameters_with_hooks
from gradfold.errors import HookError, ModelError


def test_hooks_after_accumulation_are_refused_by_name():
    model = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])
    check_hooks(model, list(model.parameters()), set())
    for layer in model:
        layer.weight.register_post_accumulate_grad_hook(lambda one: None)
        layer.bias.register_post_accumulate_grad_hook(lambda one: None)
    with pytest.raises(
        HookError, match=r"0\.weight, 0\.bias, 1\.weight and 3 more.*after accumulator\.backward"
    ) as caught:
        check_hooks(model, list(model.parameters()), set())
    assert caught.value.parameters == tuple(name for name, _ in model.named_parameters())
    assert isinstance(caught.value, ModelError)


def test_three_names_are_named_in_full():
    model = nn.ParameterDict({name: torch.zeros(1) for name in "abc"})
    for one in model.values():
        one.register_post_accumulate_grad_hook(lambda one: None)
    with pytest.raises(HookError, match=r"^a, b and c: a hook"):
        check_hooks(model, list(model.parameters()), set())


def test_a_hook_that_was_removed_is_no_obstacle():
    model = nn.Linear(1, 1)
    model.weight.register_post_accumulate_grad_hook(lambda one: None).remove()
    model.weight.register_hook(lambda gradient: None).remove()
    check_hooks(model, list(model.parameters()), set())
    assert parameters_with_hooks(model, list(model.parameters())) == []


def test_hooks_on_gradients_are_found_by_name():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert parameters_with_hooks(model, list(model.parameters())) == []
    model[1].bias.register_hook(lambda gradient: gradient)
    assert parameters_with_hooks(model, list(model.parameters())) == ["1.bias"]


def test_hooks_on_gradients_are_warned_of_once_per_parameter():
    model = nn.ParameterDict({name: torch.zeros(1) for name in "abc"})
    known: set[str] = set()
    for name in "ab":
        model[name].register_hook(lambda gradient: None)
    with pytest.warns(RuntimeWarning, match=r"hooks on a and b \(Tensor.register_hook\).*clipping is not the same"):
        check_hooks(model, list(model.parameters()), known)
    check_hooks(model, list(model.parameters()), known)  # a warning would be an error
    model["c"].register_hook(lambda gradient: None)
    with pytest.warns(RuntimeWarning, match="hooks on c "):
        check_hooks(model, list(model.parameters()), known)
    assert known == {"a", "b", "c"}
