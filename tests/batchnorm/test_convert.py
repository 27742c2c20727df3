"""Models converted from BatchNorm to GroupNorm: accumulated exactly, with every layer accounted for."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import gradfold

ROWS = 7


def loss_fn(model, batch):
    return model(batch).square().mean()


def features(channels, kind="2d", **options):
    """A small network around one BatchNorm layer, with affine parameters that are not at their start."""
    convolution = getattr(nn, f"Conv{kind}")(3, channels, 1)
    norm = getattr(nn, f"BatchNorm{kind}")(channels, **options)
    if norm.affine:
        nn.init.normal_(norm.weight, 1.0)
        nn.init.normal_(norm.bias)
    return nn.Sequential(convolution, norm, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))


def converted(layer, **options):
    return gradfold.convert_batch_norm(nn.Sequential(layer), **options)[0]


def refused(model):
    """The error of a conversion, which must have left the model as it was."""
    before = dict(model.named_modules())
    with pytest.raises(gradfold.BatchNormError) as caught:
        gradfold.convert_batch_norm(model)
    after = dict(model.named_modules())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    return caught.value


# The law


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("kind", "shape"), [("1d", (5,)), ("2d", (3, 2)), ("3d", (2, 1, 2))])
def test_a_converted_model_accumulates_exactly(kind, shape, size, mean):
    model = features(48, kind).double()
    batch = torch.randn(ROWS, 3, *shape, dtype=torch.float64) + mean
    model(batch)  # makes the lazy layer
    gradfold.convert_batch_norm(model)
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=size).backward(batch)
    assert result.num_micro_batches == -(-ROWS // size)
    assert relative_error(gradients(model), expected) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 3])
def test_layers_over_rows_accumulate_exactly_and_let_the_signal_through(size):
    model = nn.Sequential(nn.Linear(3, 48), nn.BatchNorm1d(48), nn.Tanh(), nn.Linear(48, 1)).double()
    gradfold.convert_batch_norm(model)
    batch = torch.randn(ROWS, 3).double()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    gradfold.Accumulator(model, loss_fn, micro_batch_size=size).backward(batch)
    assert relative_error(gradients(model), expected) < 1e-12
    # Two values in a group would be normalized to +1 and -1, whatever they are, and stop the gradient.
    assert float(expected["0.weight"].norm()) > 1e-2 * float(expected["3.weight"].norm())


def test_the_outputs_are_group_norm_with_the_affine_values_and_eps_of_the_layer():
    model = features(48, eps=0.25).double()
    batch = torch.randn(ROWS, 3, 4, 2).double()
    weight, bias = model[1].weight.detach().clone(), model[1].bias.detach().clone()
    gradfold.convert_batch_norm(model)
    hidden = model[0](batch)
    torch.testing.assert_close(model[1](hidden), F.group_norm(hidden, 24, weight, bias, 0.25), rtol=0, atol=0)


def test_inputs_in_channels_last_give_the_same_and_stay_so():
    model = gradfold.convert_batch_norm(features(48).double()[:2])
    batch = torch.randn(ROWS, 3, 4, 2).double()
    outputs = model.to(memory_format=torch.channels_last)(batch.to(memory_format=torch.channels_last))
    assert outputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(outputs, copy.deepcopy(model).to(memory_format=torch.contiguous_format)(batch))


# What is carried over


def test_the_very_parameters_are_kept_so_that_optimizers_stay_valid():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, dtype=torch.bfloat16))
    model[1].bias.requires_grad_(False)
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert gradfold.convert_batch_norm(model) is model
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)
    assert (model[1].weight.dtype, model[1].bias.requires_grad) == (torch.bfloat16, False)
    model[1].weight.grad = torch.ones_like(model[1].weight)
    optimizer.step()
    assert torch.equal(model[1].weight, torch.zeros(8, dtype=torch.bfloat16))


def test_layers_on_a_device_without_values_stay_there():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    gradfold.convert_batch_norm(model)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_layers_without_affine_parameters_get_none():
    norm = converted(nn.BatchNorm2d(8, affine=False))
    assert (norm.affine, norm.weight, norm.bias) == (False, None, None)
    assert norm(torch.randn(2, 8, 3, 3)).shape == (2, 8, 3, 3)
    without_bias = nn.BatchNorm2d(8, bias=False)
    norm = converted(without_bias)
    assert norm.affine and norm.weight is without_bias.weight and norm.bias is None


def test_running_statistics_are_dropped():
    model = gradfold.convert_batch_norm(features(8))
    assert not list(model.buffers())
    assert {name for name in model.state_dict() if name.startswith("1.")} == {"1.weight", "1.bias"}


def test_a_layer_in_two_places_becomes_one_layer():
    norm = nn.BatchNorm2d(8)
    model = nn.ModuleDict({"left": nn.Sequential(norm), "right": norm, "other": nn.BatchNorm2d(8)})
    gradfold.convert_batch_norm(model)
    assert model["left"][0] is model["right"] and model["other"] is not model["right"]
    assert model["right"].weight is norm.weight
    assert [type(module) for module in model.children()] == [nn.Sequential, nn.GroupNorm, nn.GroupNorm]


def test_a_layer_that_is_itself_the_model_is_returned_new():
    norm = nn.BatchNorm2d(8)
    new = gradfold.convert_batch_norm(norm)
    assert isinstance(new, nn.GroupNorm) and new.weight is norm.weight and isinstance(norm, nn.BatchNorm2d)


def test_a_compiled_model_runs_the_new_layers():
    torch.compiler.reset()  # what other tests compiled makes sizes symbolic
    model = features(8)
    batch = torch.randn(ROWS, 3, 4, 2)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    old = compiled(batch)
    assert gradfold.convert_batch_norm(compiled) is compiled
    torch.testing.assert_close(compiled(batch), model(batch))
    assert not torch.allclose(compiled(batch), old)


# The number of groups


@pytest.mark.parametrize(
    ("layer", "num_groups"),
    [
        (nn.BatchNorm2d(48), 24),  # not 32, which is no divisor, nor 48
        (nn.BatchNorm2d(64), 32),
        (nn.BatchNorm2d(256), 32),
        (nn.BatchNorm2d(100), 25),
        (nn.BatchNorm2d(32), 16),  # not 32: instance norm
        (nn.BatchNorm3d(4), 2),
        (nn.BatchNorm2d(7), 1),
        (nn.BatchNorm2d(1), 1),
        (nn.BatchNorm1d(48), 3),
        (nn.BatchNorm1d(1024), 32),
        (nn.BatchNorm1d(40), 2),
        (nn.BatchNorm1d(31), 1),
        (nn.BatchNorm1d(3), 1),
        (nn.SyncBatchNorm(48), 3),
    ],
    ids=str,
)
def test_groups_are_the_largest_divisor_that_leaves_enough_channels(layer, num_groups):
    norm = converted(layer)
    assert (type(norm), norm.num_groups, norm.num_channels) == (nn.GroupNorm, num_groups, layer.num_features)


def test_groups_can_be_fewer():
    assert converted(nn.BatchNorm2d(48), num_groups=7).num_groups == 6
    assert converted(nn.BatchNorm2d(48), num_groups=1).num_groups == 1


def test_rows_of_one_or_two_channels_are_refused_since_nothing_would_be_left():
    model = nn.ModuleDict(
        {"one": nn.Sequential(nn.BatchNorm1d(1)), "sync": nn.SyncBatchNorm(1), "two": nn.BatchNorm2d(2)}
    )
    error = refused(model)
    assert error.layers == ("one.0",)
    assert "BatchNorm in one.0 (BatchNorm1d) has 1 channel:" in str(error) and "nn.GroupNorm(1, 1)" in str(error)
    assert "has 2 channels" in str(refused(nn.Sequential(nn.BatchNorm1d(2))))


# What is left alone


def test_layers_that_are_no_batch_norm_stay():
    model = nn.Sequential(nn.InstanceNorm2d(8), nn.LayerNorm(4), nn.GroupNorm(2, 8))
    layers = list(model)
    assert gradfold.convert_batch_norm(model) is model
    assert list(model) == layers
    assert gradfold.convert_batch_norm(model.eval()) is model


def test_frozen_layers_stay_and_couple_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten()).double()
    frozen = model[0]
    gradfold.convert_batch_norm(model)
    assert model[0] is frozen and isinstance(model[2], nn.GroupNorm)
    batch = torch.randn(ROWS, 3, 2, 2).double()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(batch)
    assert relative_error(gradients(model), expected) < 1e-12


def test_layers_that_keep_no_statistics_couple_in_any_mode_and_are_converted():
    norm = converted(nn.BatchNorm2d(8, track_running_stats=False).eval())
    assert isinstance(norm, nn.GroupNorm) and not norm.training


def test_a_model_in_evaluation_mode_is_refused_since_it_hides_what_is_frozen():
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    error = refused(model)
    assert error.layers == ("0",) and "Call model.train() first" in str(error)
    assert "the model itself" in str(refused(nn.BatchNorm2d(8).eval()))


# What cannot be converted


class WithDropout(nn.BatchNorm2d):
    """A layer that does more than BatchNorm."""

    def forward(self, input):
        return F.dropout(super().forward(input), 0.5)


class Renamed(nn.BatchNorm2d):
    """A layer of another name, which does what BatchNorm does."""

    def __init__(self, channels):
        super().__init__(channels, momentum=0.01)


def test_a_layer_with_a_forward_of_its_own_is_refused_by_name():
    error = refused(nn.Sequential(nn.BatchNorm2d(8), nn.Sequential(WithDropout(8))))
    assert error.layers == ("1.0",) and "(WithDropout) has a custom forward" in str(error)
    patched = nn.BatchNorm2d(8)
    patched.forward = lambda input: input  # as libraries that move layers between devices do
    assert "custom forward" in str(refused(nn.Sequential(patched)))
    assert isinstance(converted(Renamed(8)), nn.GroupNorm)


def test_a_lazy_layer_needs_one_forward_pass():
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.Flatten())
    error = refused(model)
    assert error.layers == ("0",) and "Run one forward pass first" in str(error)
    model(torch.randn(2, 8, 3, 3))
    assert isinstance(gradfold.convert_batch_norm(model)[0], nn.GroupNorm)
    unknown = nn.Sequential(nn.LazyBatchNorm2d(affine=False, track_running_stats=False))
    unknown(torch.randn(2, 8, 3, 3))  # has nothing that would tell it its channels
    assert "does not know its number of channels" in str(refused(unknown))


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_forward_hook(lambda *_: None),
        lambda layer: layer.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.register_full_backward_hook(lambda *_: None),
        lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
    ],
)
def test_a_layer_with_hooks_is_refused_until_they_are_removed(register):
    model = nn.Sequential(nn.BatchNorm2d(8))
    handle = register(model[0])
    error = refused(model)
    assert error.layers == ("0",) and "carries hooks (" in str(error)
    handle.remove()
    assert isinstance(gradfold.convert_batch_norm(model)[0], nn.GroupNorm)


def test_hooks_elsewhere_stay():
    model, seen = nn.Sequential(nn.BatchNorm2d(8)), []
    model.register_forward_hook(lambda *_: seen.append(1))
    gradfold.convert_batch_norm(model)(torch.randn(2, 8, 3, 3))
    assert seen == [1]


def test_pruned_and_parametrized_layers_are_refused():
    pruned = prune.random_unstructured(nn.BatchNorm2d(8), "weight", 0.5)
    assert "holds weight_mask, weight_orig" in str(refused(nn.Sequential(pruned)))
    layer = nn.BatchNorm2d(8)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert "holds parametrizations" in str(refused(nn.Sequential(layer)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_layers_within_a_graph_are_refused():
    error = refused(nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))))
    assert error.layers == ("0.1",) and "BatchNorm in 0.1 was scripted" in str(error)
    error = refused(nn.Sequential(torch.compile(nn.BatchNorm2d(8), backend="eager")))
    assert error.layers == ("0",) and "compiled by itself" in str(error)


def test_layers_of_the_same_obstacle_are_named_together():
    error = refused(nn.Sequential(*[WithDropout(8) for _ in range(4)], nn.LazyBatchNorm2d()))
    assert error.layers == ("0", "1", "2", "3") and "BatchNorm in 0, 1, 2 and 1 more (WithDropout)" in str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": nn.BatchNorm2d}, "model is a type; expected an nn.Module"),
        ({"num_groups": 0}, "num_groups=0; expected a whole number of at least 1"),
        ({"num_groups": 2.0}, "num_groups=2.0"),
        ({"num_groups": True}, "num_groups=True"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(gradfold.OptionError, match=message):
        gradfold.convert_batch_norm(**{"model": nn.Linear(1, 1), **arguments})


def test_the_refusal_of_batch_norm_names_the_conversion():
    model = nn.Sequential(nn.Linear(3, 48), nn.BatchNorm1d(48), nn.Linear(48, 1))
    batch = torch.randn(ROWS, 3)
    with pytest.raises(gradfold.BatchNormError, match=r"gradfold\.convert_batch_norm\(model\)"):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(batch)
    gradfold.Accumulator(gradfold.convert_batch_norm(model), loss_fn, micro_batch_size=2).backward(batch)
