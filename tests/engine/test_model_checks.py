"""Hooks on parameters: those that act on each micro-batch are refused, those that see its gradient are named."""

from __future__ import annotations

import importlib

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch import nn
from torch.ao import quantization

import gradfold
from gradfold.engine.model_checks import check_hooks, parameters_with_hooks
from gradfold.errors import HookError, ModelError, NotDecomposableError


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


def classify(model, batch):
    words, targets = batch
    return nn.functional.cross_entropy(model(words), targets)


def embedding(**options):
    return nn.Sequential(nn.EmbeddingBag(9, 4, mode="sum", **options), nn.Linear(4, 3)).double()


def words_and_targets(rows=8):
    return torch.randint(0, 9, (rows, 3)), torch.randint(0, 3, (rows,))


class Embedded(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words, self.out = nn.Embedding(9, 4, **options), nn.Linear(4, 3)

    def forward(self, words):
        return self.out(self.words(words).mean(1))


@pytest.mark.parametrize("make", [embedding, lambda **options: Embedded(**options).double()])
def test_gradients_divided_by_how_often_a_word_occurs_are_refused(make):
    model, batch = make(scale_grad_by_freq=True), words_and_targets()
    with pytest.raises(NotDecomposableError, match="scale_grad_by_freq") as caught:
        gradfold.Accumulator(model, classify, micro_batch_size=2).backward(batch)
    assert caught.value.cause == "coupled"
    gradfold.Accumulator(model, classify, micro_batch_size=8).backward(batch)  # the whole batch is right


def test_a_frozen_embedding_has_no_gradient_to_divide():
    model = embedding(scale_grad_by_freq=True)
    model[0].weight.requires_grad_(False)
    batch = words_and_targets()
    expected = full_batch_gradient(model, lambda model: classify(model, batch))
    gradfold.Accumulator(model, classify, micro_batch_size=2).backward(batch)
    assert relative_error(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize("parametrize", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectral_norm_is_refused_by_name_while_it_learns(parametrize, dtype):
    model = nn.Sequential(parametrize(nn.Linear(4, 3))).to(dtype)
    batch = torch.randn(8, 4, dtype=dtype), torch.randint(0, 3, (8,))
    with pytest.raises(NotDecomposableError, match=r"^0.*spectral norm in training mode") as caught:
        gradfold.Accumulator(model, classify, micro_batch_size=2).backward(batch)
    assert caught.value.cause == "state"
    model.eval()
    gradfold.Accumulator(model, classify, micro_batch_size=2).backward(batch)


@pytest.mark.filterwarnings("ignore")
def test_observers_are_refused_by_name_until_they_are_frozen():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model.train(), inplace=True)
    batch = torch.randn(8, 4), torch.randint(0, 3, (8,))
    with pytest.raises(NotDecomposableError, match=r"weight_fake_quant.*disable_observer"):
        gradfold.Accumulator(model, classify, micro_batch_size=2).backward(batch)
    model(batch[0])
    model.apply(quantization.disable_observer)
    expected = full_batch_gradient(model, lambda model: classify(model, batch))
    gradfold.Accumulator(model, classify, micro_batch_size=2).backward(batch)
    assert relative_error(gradients(model), expected) <= 2e-6


def stepping(model):
    """An optimizer that steps in a hook of the AccumulateGrad nodes, which nothing lists."""
    kept = []
    for parameter in model.parameters():
        node = parameter.view_as(parameter).grad_fn.next_functions[0][0]

        def hook(*_, parameter=parameter):
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
            parameter.grad = None

        node.register_hook(hook)
        kept.append(node)  # alive as long as the parameter is used
    return kept


def test_an_optimizer_in_hooks_of_the_graph_is_refused_after_one_step():
    model, batch = nn.Linear(4, 3), (torch.randn(8, 4), torch.randint(0, 3, (8,)))
    nodes = stepping(model)
    with pytest.raises(HookError, match="weight and bias: changed by the backward pass"):
        gradfold.Accumulator(model, classify, micro_batch_size=2).backward(batch)
    assert nodes


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("self_check", [True, False])
def test_torch_s_own_optimizer_in_backward_is_refused_before_a_step(self_check):
    model, batch = nn.Linear(4, 3), (torch.randn(8, 4), torch.randint(0, 3, (8,)))
    importlib.import_module("torch.distributed.optim")._apply_optimizer_in_backward(
        torch.optim.SGD, model.parameters(), {"lr": 0.1}
    )
    before = model.weight.detach().clone()
    with pytest.raises(HookError, match="_apply_optimizer_in_backward"):
        gradfold.Accumulator(model, classify, micro_batch_size=2, self_check=self_check).backward(batch)
    assert torch.equal(model.weight, before)


def test_a_forward_pass_that_renormalizes_its_embedding_is_no_step():
    model, batch = Embedded(max_norm=0.5).double(), words_and_targets()
    expected = full_batch_gradient(model, lambda model: classify(model, batch))
    gradfold.Accumulator(model, classify, micro_batch_size=2).backward(batch)
    assert relative_error(gradients(model), expected) <= 1e-12


def test_gradients_per_sample_are_refused():
    model, batch = nn.Linear(4, 3), (torch.randn(8, 4), torch.randint(0, 3, (8,)))
    for parameter in model.parameters():
        parameter.grad_sample = None  # as Opacus marks them
    with pytest.raises(HookError, match="BatchMemoryManager"):
        gradfold.Accumulator(model, classify, micro_batch_size=2).backward(batch)
