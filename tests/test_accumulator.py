"""The front door: what it takes, what it refuses and how, and what stands in .grad."""

from __future__ import annotations

import copy
import math
from collections import namedtuple

import pytest
import torch
from reference import assert_same_state, full_batch_gradient, gradients, relative_error, state
from torch import nn

import gradfold

F = nn.functional


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def make(rows: int = 33) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    return model, (torch.randn(rows, 4).double(), torch.randn(rows, 2).double() + 1e4)


def test_the_literature_s_scalar_example():
    """One weight at 1, y = 2x, squared error, micro-batches [4.0] and [2.0]: -16, then -20, then 1.2."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    seen = []

    def loss_fn(model, inputs):
        if model.weight.grad is not None:
            seen.append(model.weight.grad.item())
        return F.mse_loss(model(inputs), 2 * inputs)

    gradfold.Accumulator(model, loss_fn, micro_batch_size=1).backward(torch.tensor([[4.0], [2.0]]))
    assert [*seen, model.weight.grad.item()] == [-16.0, -20.0]
    torch.optim.SGD(model.parameters(), 0.01).step()
    assert model.weight.item() == pytest.approx(1.2)


def test_accumulation_is_linear_over_windows_and_keeps_the_same_tensors():
    model, batch = make()
    expected = full_batch_gradient(model, lambda model: 2 * loss_fn(model, batch))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=5)
    accumulator.backward(batch)
    tensors = [parameter.grad for parameter in model.parameters()]
    accumulator.backward(batch)
    assert all(parameter.grad is tensor for parameter, tensor in zip(model.parameters(), tensors, strict=True))
    assert relative_error(gradients(model), expected) < 1e-12
    assert accumulator.num_windows == 2


def test_zeros_found_in_grad_are_added_to():
    model, batch = make()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tensors = [parameter.grad for parameter in model.parameters()]
    gradfold.Accumulator(model, loss_fn, micro_batch_size=5).backward(batch)
    assert all(parameter.grad is tensor for parameter, tensor in zip(model.parameters(), tensors, strict=True))
    assert relative_error(gradients(model), expected) < 1e-12


def test_parameters_outside_of_the_model_get_their_gradient_too():
    model, batch = make()
    temperature = nn.Parameter(torch.tensor(2.0).double())

    def scaled(model, batch):
        return F.mse_loss(model(batch[0]) * temperature, batch[1])

    scaled(model, batch).backward()
    expected = temperature.grad.item()
    temperature.grad = None
    gradfold.Accumulator(model, scaled, micro_batch_size=5).backward(batch)
    assert temperature.grad.item() == pytest.approx(expected, rel=1e-12)


def test_a_0d_parameter_that_is_its_own_loss():
    """Its gradient is the seed itself: the engine must not hand out a tensor that it uses again."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.tensor(3.0))
    accumulator = gradfold.Accumulator(model, lambda model, batch: model.weight, micro_batch_size=1)
    result = accumulator.backward(torch.randn(4, 1))
    assert (model.weight.grad.item(), result.loss.item()) == (1.0, 3.0)
    model.weight.grad.mul_(7)
    accumulator.backward(torch.randn(4, 1))
    assert model.weight.grad.item() == 8.0


def test_lazy_parameters_are_made_by_the_first_window():
    model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(1))
    gradfold.Accumulator(model, lambda model, batch: model(batch).mean(), micro_batch_size=2).backward(torch.ones(5, 4))
    twin = copy.deepcopy(model)
    expected = full_batch_gradient(twin, lambda model: model(torch.ones(5, 4)).mean())
    assert relative_error(gradients(model), expected) < 2e-6


def test_a_lazy_model_whose_first_window_fails_has_no_gradients():
    model = nn.Sequential(nn.LazyLinear(3))
    done = []

    def failing(model, batch):
        done.append(1)
        if len(done) == 2:
            raise RuntimeError("stop")
        return model(batch).mean()

    with pytest.raises(RuntimeError, match="stop"):
        gradfold.Accumulator(model, failing, micro_batch_size=2).backward(torch.ones(5, 4))
    assert gradients(model) == {}


def test_a_compiled_model_and_a_nested_one_give_the_same_gradient():
    model, batch = make(10)
    outer = nn.ModuleDict({"inner": torch.compile(model, backend="eager")})
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    accumulator = gradfold.Accumulator(outer, lambda outer, batch: loss_fn(outer["inner"], batch), micro_batch_size=3)
    accumulator.backward(batch)
    assert relative_error(gradients(model), expected) < 1e-12


def test_sparse_gradients_are_coalesced():
    model = nn.Embedding(50, 2, sparse=True)
    batch = torch.randint(0, 5, (24,))
    accumulator = gradfold.Accumulator(model, lambda model, batch: model(batch).square().mean(), micro_batch_size=3)
    accumulator.backward(batch)
    assert model.weight.grad.is_coalesced() and model.weight.grad._nnz() == len(batch.unique())


def test_host_reads_do_not_grow_with_the_number_of_micro_batches(monkeypatch):
    model, batch = make(32)
    reads = 0

    def counted(original):
        def reading(self):
            nonlocal reads
            reads += 1
            return original(self)

        return reading

    read = gradfold.engine.loss_terms.LossTerms.add

    def add(self, index, loss):
        weighed = read(self, index, loss)
        nonlocal reads
        reads -= len(weighed)  # on a device a loss is read with all others at the end
        return weighed

    monkeypatch.setattr(gradfold.engine.loss_terms.LossTerms, "add", add)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    counts = []
    for size in (16, 1):
        reads = 0
        weight = {"loss": lambda batch: torch.tensor(len(batch[0])), "mean": "samples"}
        accumulator = gradfold.Accumulator(
            model,
            lambda model, batch: (loss_fn(model, batch), {"mean": batch[0].mean()}),
            micro_batch_size=size,
            weight=weight,
            self_check=False,  # reads once more, in its one window
        )
        accumulator.backward(batch)
        counts.append(reads)
    assert counts == [2, 2]  # the weights before the first backward, the losses at close


Refusal = namedtuple("Refusal", "error words")
SAMPLES = [(torch.randn(4), torch.randn(2)) for _ in range(3)]
INPUTS, TARGETS = torch.randn(6, 4).double(), torch.randn(6, 2).double()
BAD_BATCHES = {
    "rows disagree": ((INPUTS, TARGETS[:5]), ["batch[0] (6, 4)", "batch[1] (5, 2)", "dim 0"]),
    "samples": (SAMPLES, ["list of samples", "collate="]),
    "images": (tuple(torch.randn(3, 8, 8) for _ in range(8)), ["list of samples", "agree in dim 0 (3)", "collate="]),
    "images of several sizes": ([torch.randn(3, n, 8) for n in range(2, 10)], ["list of samples", "collate="]),
    "empty": ((INPUTS[:0], TARGETS[:0]), ["no rows", "(0, 4)"]),
    "no tensor": ({"a": None, "b": 1.0}, ["no tensor"]),
    "nothing": ((), ["no tensor"]),
}


@pytest.mark.parametrize("batch, words", BAD_BATCHES.values(), ids=BAD_BATCHES.keys())
def test_a_batch_that_cannot_be_cut_is_refused_with_paths_and_shapes(batch, words):
    model, _ = make()
    check_refused(model, gradfold.Accumulator(model, loss_fn, micro_batch_size=2), batch, gradfold.BatchError, words)


def test_samples_are_refused_without_a_sequence_or_when_there_are_none():
    model, _ = make()
    accumulator = gradfold.Accumulator(model, loss_fn, collate=torch.utils.data.default_collate)
    check_refused(model, accumulator, (), gradfold.BatchError, ["empty list of samples"])
    check_refused(
        model, accumulator, {"x": INPUTS}, gradfold.BatchError, ["list of samples", "dict", "collate_fn=list"]
    )


nan = torch.tensor(math.nan)
BAD_LOSSES = {
    "not 0-d": (lambda model, batch: model(batch[0]), ["(2, 2)", "0-d", "mean"]),
    "one element": (lambda model, batch: model(batch[0]).mean().reshape(1), ["(1,)", "0-d"]),
    "no gradient": (lambda model, batch: model(batch[0]).mean().detach(), ["does not require grad", ".detach()"]),
    "integer": (lambda model, batch: torch.tensor(1), ["torch.int64", "floating point"]),
    "a number": (lambda model, batch: 1.0, ["float", "expected a 0-d tensor"]),
    "none": (lambda model, batch: None, ["NoneType", "expected a 0-d tensor"]),
    "three things": (lambda model, batch: (1, 2, 3), ["tuple", "pair"]),
    "no terms": (lambda model, batch: {}, ["dict", "by term"]),
    "nan": (lambda model, batch: model(batch[0]).mean() * nan, ["nan", "micro-batch 0 of 3", "rows 0 to 1"]),
    "metric of other rows": (
        lambda model, batch: (model(batch[0]).mean(), {"m": torch.zeros(5)}),
        ["'m'", "(5,)", "2 rows"],
    ),
    "metric is a list": (lambda model, batch: (model(batch[0]).mean(), {"m": [1]}), ["'m'", "list"]),
    "metric named as the loss": (lambda model, batch: (model(batch[0]).mean(), {"loss": 1.0}), ["'loss'", "rename"]),
}


@pytest.mark.parametrize("bad, words", BAD_LOSSES.values(), ids=BAD_LOSSES.keys())
def test_a_loss_that_is_none_is_refused_by_what_it_is(bad, words):
    model, _ = make()
    accumulator = gradfold.Accumulator(model, bad, micro_batch_size=2)
    check_refused(model, accumulator, (INPUTS, TARGETS), gradfold.LossError, words)


def test_a_non_finite_loss_names_the_first_micro_batch_and_leaves_no_gradient():
    model, batch = make(6)
    batch[0][3:] = math.inf
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2)
    error = check_refused(model, accumulator, batch, gradfold.NonFiniteLossError, ["micro-batch 1 of 3", "rows 2 to 3"])
    assert (error.micro_batch, error.term) == (1, "loss") and not math.isfinite(error.value)


BAD_WEIGHTS = {
    "negative": (lambda batch: -1, ["-1", "at least 0"]),
    "nan": (lambda batch: math.nan, ["nan", "micro-batch 0"]),
    "nan tensor": (lambda batch: nan, ["nan", "micro-batch 0"]),
    "inf": (lambda batch: math.inf, ["inf", "finite"]),
    "text": (lambda batch: "three", ["str", "one number"]),
    "nothing": (lambda batch: None, ["NoneType", "one number"]),
    "several": (lambda batch: batch[0], ["(2, 4)", "one number"]),
    "no such key": (gradfold.token_count("labels"), ["token_count('labels')", "tuple"]),
    "a name without a term": ({"loss": "samples", "los": "samples"}, ["weight 'los' has no term"]),
    "a term without a weight": ({"lost": "samples"}, ["loss term 'loss'", "'lost'", "no weight"]),
}


@pytest.mark.parametrize("weight, words", BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_a_weight_that_is_none_is_refused_by_what_it_is(weight, words):
    model, _ = make()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, weight=weight)
    check_refused(model, accumulator, (INPUTS, TARGETS), gradfold.WeightError, words)


def check_refused(model, accumulator, batch, error, words):
    """The error says its words, and nothing is lost: gradients at entry and random state are as they were."""
    F.mse_loss(model(INPUTS), TARGETS).backward()
    before = state(model)
    with pytest.raises(error) as caught:
        accumulator.backward(batch)
    for word in words:
        assert word in str(caught.value)
    assert_same_state(state(model), before)
    return caught.value


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"micro_batch_size": 0}, gradfold.OptionError, ["micro_batch_size=0", "at least 1"]),
        ({"micro_batch_size": -3}, gradfold.OptionError, ["-3"]),
        ({"micro_batch_size": 2.0}, gradfold.OptionError, ["2.0", "float"]),
        ({"micro_batch_size": True}, gradfold.OptionError, ["True", "bool"]),
        ({"micro_batch_size": "much"}, gradfold.OptionError, ["'much'", '"auto"']),
        ({"weight": "tokens"}, gradfold.WeightError, ["'tokens'", "token_count"]),
        ({"weight": {}}, gradfold.WeightError, ["empty"]),
        ({"weight": 3}, gradfold.WeightError, ["weight=3"]),
        ({"batch_norm": "exact", "on_non_finite": "skip_micro_batch"}, gradfold.OptionError, ["exact", "skip_update"]),
        ({"batch_norm": "local"}, gradfold.OptionError, ["'local'"]),
        ({"collate": [1]}, gradfold.OptionError, ["collate", "list"]),
        ({"backward": 3}, gradfold.OptionError, ["backward", "int"]),
    ],
)
def test_options_that_cannot_work_are_refused_at_once(options, error, words):
    model, _ = make()
    with pytest.raises(error) as caught:
        gradfold.Accumulator(model, loss_fn, **options)
    assert all(word in str(caught.value) for word in words)


def test_a_model_or_loss_function_of_the_wrong_kind_is_refused():
    with pytest.raises(gradfold.OptionError, match=r"function.*expected an nn\.Module"):
        gradfold.Accumulator(loss_fn, loss_fn)
    with pytest.raises(gradfold.OptionError, match=r"loss_fn is a NoneType"):
        gradfold.Accumulator(nn.Linear(1, 1), None)


def test_a_model_without_trainable_parameters_is_refused():
    model, batch = make()
    model.requires_grad_(False)
    with pytest.raises(gradfold.ModelError, match=r"no trainable parameters \(4 parameters"):
        gradfold.Accumulator(model, loss_fn).backward(batch)
    with pytest.raises(gradfold.ModelError, match=r"no trainable parameters \(0 parameters"):
        gradfold.Accumulator(nn.ReLU(), loss_fn).backward(batch)


def test_a_loss_under_no_grad_is_refused():
    model, batch = make()
    with pytest.raises(gradfold.LossError, match=r"torch\.no_grad"), torch.no_grad():
        gradfold.Accumulator(model, loss_fn).backward(batch)


def test_a_micro_batch_size_above_the_batch_is_one_micro_batch():
    model, batch = make(5)
    assert gradfold.Accumulator(model, loss_fn, micro_batch_size=64).backward(batch).num_micro_batches == 1


def test_post_accumulate_hooks_are_refused_by_name_once_there_are_two_micro_batches():
    model, batch = make(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model[2].weight.register_post_accumulate_grad_hook(lambda parameter: optimizer.step())
    with pytest.raises(gradfold.HookError, match=r"2\.weight.*register_post_accumulate_grad_hook") as caught:
        gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(batch)
    assert caught.value.parameters == ("2.weight",)
    assert gradients(model) == {}
    gradfold.Accumulator(model, loss_fn).backward(batch)  # the hook sees the whole gradient


def test_hooks_on_gradients_are_warned_about_once():
    model, batch = make(4)
    model[0].bias.register_hook(lambda gradient: gradient.clamp(-1, 1))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2)
    with pytest.warns(RuntimeWarning, match=r"hooks on 0\.bias.*clipping"):
        accumulator.backward(batch)
    accumulator.backward(batch)  # warnings are errors here


def test_a_loss_below_float32_is_taken_and_its_rounded_weight_is_said():
    model = nn.Linear(3, 1)
    batch = torch.randn(6, 3)

    def low(model, batch):
        return model(batch).mean().to(torch.bfloat16)

    result = gradfold.Accumulator(model, low, micro_batch_size=3).backward(batch)  # 1/2 is exact
    assert result.loss.dtype == torch.float32
    with pytest.warns(RuntimeWarning, match=r"bfloat16.*rounded.*float32"):
        gradfold.Accumulator(model, low, micro_batch_size=2).backward(batch)  # 1/3 is not


def test_the_state_is_the_count_of_windows():
    model, batch = make(4)
    accumulator = gradfold.Accumulator(model, loss_fn)
    accumulator.backward(batch)
    other = gradfold.Accumulator(model, loss_fn)
    other.load_state_dict(accumulator.state_dict())
    assert other.num_windows == 1


def test_a_batch_that_is_refused_is_refused_however_often_it_is_tried():
    model = nn.Linear(3, 2)
    accumulator = gradfold.Accumulator(model, lambda model, batch: model(batch).square().sum(), micro_batch_size=4)
    for _ in range(20):
        with pytest.raises(gradfold.NotDecomposableError, match="sum"):
            accumulator.backward(torch.randn(12, 3))
    assert gradients(model) == {} and accumulator.num_windows == 0


def test_a_window_that_failed_is_checked_when_it_runs_again():
    """The self-check was not sure the first time, and the window failed for another reason."""
    model, calls = nn.Linear(3, 2), []

    def loss_fn(model, batch):
        calls.append(len(batch))
        if len(calls) == 1:
            raise MemoryError  # in the self-check, which leaves it at that
        if len(calls) == 2:
            raise ZeroDivisionError
        return model(batch).square().sum()

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4)
    with pytest.raises(ZeroDivisionError):
        accumulator.backward(torch.randn(12, 3))
    with pytest.raises(gradfold.NotDecomposableError, match="sum"):
        accumulator.backward(torch.randn(12, 3))
