"""A context: the model as flat lists, walked again only when something has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradfold.engine.window import Context
from gradfold.errors import ModelError


class Tied(nn.Module):
    """Nested and named modules, a parameter in two places, one that is frozen, and an empty slot for each."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 3, bias=False)))
        self.head = nn.Linear(2, 3)
        self.head.weight = self.body[2][0].weight
        self.body[0].bias.requires_grad_(False)
        self.register_module("later", None)


@pytest.fixture
def model():
    return Tied()


def assert_as_walked(context, model):
    """The lists are those of a walk through the model now."""
    assert list(map(id, context.modules)) == list(map(id, model.modules()))
    assert list(map(id, context.parameters)) == list(map(id, model.parameters()))
    assert context.modes == [module.training for module in model.modules()]


def replace_parameter(model):
    model.body[0].weight = nn.Parameter(torch.zeros(2, 2))


def add_parameter(model):
    model.body[1].scale = nn.Parameter(torch.zeros(2))


def take_parameter_away(model):
    model.body[0].bias = None


def swap_parameters(model):
    one, other = model.head, model.body[0]
    one.bias, other.bias = other.bias, one.bias


def add_module(model):
    model.body.append(nn.Linear(3, 1))


def fill_slot(model):
    model.later = nn.Linear(2, 2)


def replace_module(model):
    model.head = nn.Linear(2, 3)


def replace_nested_module(model):
    model.body[2][0] = nn.Linear(2, 3)


def remove_module(model):
    del model.body[1]


def change_class(model):
    class Other(nn.Linear):
        pass

    model.head.__class__ = Other


CHANGES = [
    replace_parameter,
    add_parameter,
    take_parameter_away,
    swap_parameters,
    add_module,
    fill_slot,
    replace_module,
    replace_nested_module,
    remove_module,
    change_class,
]


def test_it_is_the_model_as_flat_lists(model):
    context = Context(model)
    assert context.model is model and context.device == torch.device("cpu")
    assert_as_walked(context, model)
    assert len(context.parameters) == len(set(map(id, context.parameters))), "the tied one is there once"


@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(model, change, is_settled):
    context = Context(model)
    if is_settled:
        context.update()
    version = context.version
    change(model)
    context.update()
    assert context.version != version
    assert_as_walked(context, model)
    settled = context.version
    context.update()
    assert context.version == settled, "once"


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.body[2][0], lambda model: model.body[1]])
def test_a_changed_mode_is_noticed_and_the_model_is_not_walked_again(model, part, monkeypatch):
    context = Context(model)
    modules, parameters, version = context.modules, context.parameters, context.version
    monkeypatch.setattr(Context, "_walk", lambda self: pytest.fail("no module has changed"))
    part(model).eval()
    context.update()
    assert context.version == version + 1
    assert context.modules is modules and context.parameters is parameters
    assert_as_walked(context, model)
    part(model).train()
    context.update()
    assert context.version == version + 2
    assert_as_walked(context, model)


def test_where_nothing_has_changed_the_lists_are_the_same(model, monkeypatch):
    context = Context(model)
    modules, parameters, modes, version = context.modules, context.parameters, context.modes, context.version
    monkeypatch.setattr(Context, "_walk", lambda self: pytest.fail("nothing has changed"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
            parameter.grad = torch.ones_like(parameter)
    model.body[1].running_mean.add_(1)
    model.note = "an attribute"
    for _ in range(2):
        context.update()
        assert context.modules is modules and context.parameters is parameters and context.modes is modes
        assert context.version == version


def test_a_frozen_parameter_stays_in_the_lists(model):
    context = Context(model)
    model.requires_grad_(False)
    context.update()
    assert_as_walked(context, model)
    with pytest.raises(ModelError):
        context.check_trainable()
    model.head.bias.requires_grad_(True)
    context.check_trainable()


def test_the_device_is_that_of_the_first_parameter(model):
    assert Context(model.to("meta")).device.type == "meta"
    context = Context(nn.ReLU())
    assert context.device.type == "cpu" and context.parameters == []


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_that_moves_to_another_device_takes_the_context_along(model, in_place):
    """In place, as where a model goes to a GPU: the parameters are the same objects."""
    context = Context(model)
    parameters = context.parameters
    torch.__future__.set_swap_module_params_on_conversion(in_place)
    try:
        model.to("meta")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    context.update()
    assert (list(map(id, model.parameters())) == list(map(id, parameters))) is in_place
    assert_as_walked(context, model)
    assert context.device.type == "meta"


def test_hooks_are_found_whenever_they_come():
    model = nn.Linear(2, 1)
    context = Context(model)
    assert not context.has_hooks()
    handle = model.bias.register_hook(lambda gradient: None)
    assert context.has_hooks()
    handle.remove()
    assert not context.has_hooks()
    model.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    assert context.has_hooks()


def test_one_trainable_parameter_is_enough():
    model = nn.Linear(2, 1)
    model.weight.requires_grad_(False)
    Context(model).check_trainable()
    Context(nn.LazyLinear(1)).check_trainable()


def test_nothing_to_train_is_refused_with_the_count_and_what_to_write():
    with pytest.raises(ModelError, match=r"Linear has no trainable parameters \(2 parameters.*requires_grad_\(\)"):
        Context(nn.Linear(2, 1).requires_grad_(False)).check_trainable()
    with pytest.raises(ModelError, match=r"ReLU has no trainable parameters \(0 parameters"):
        Context(nn.ReLU()).check_trainable()
