"""The law: whatever the model, the batch, the split and the weights, .grad is that of the whole batch."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import full_batch_gradient, gradients, relative_error
from torch import Tensor, nn

import gradfold

pytestmark = pytest.mark.filterwarnings("ignore:weight= is 0")  # as some of the batches drawn are
F = nn.functional
TOLERANCE = 1e-12
settings.register_profile("gradfold", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("gradfold")


class Net(nn.Module):
    """Embedding (maybe sparse), shared, frozen and unused layers, two heads; float64."""

    def __init__(self, width: int, *, sparse: bool, shared: bool, frozen: bool, unused: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width, sparse=sparse)
        self.first = nn.Linear(width, width)
        self.second = self.first if shared else nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width, 7)
        self.value = nn.Linear(width, 1)
        if shared and not sparse:
            self.classes.weight = self.embedding.weight
        if frozen:
            self.first.requires_grad_(False)
        if unused:
            self.never = nn.Linear(3, 3)
        self.double()

    def forward(self, tokens: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embedding(tokens) * scale[:, None, None]  # (B, T, width)
        hidden = self.norm(torch.tanh(self.second(torch.tanh(self.first(hidden)))))
        return self.classes(hidden), self.value(hidden.mean(1)).squeeze(-1)  # (B, T, 7), (B,)


class Labels(NamedTuple):
    tokens: Tensor  # (B, T), -100: ignored
    value: Tensor  # (B,)


def make_batch(rows: int, length: int, shift: float, ignored: float) -> dict[str, object]:
    labels = torch.randint(0, 7, (rows, length))
    labels[torch.rand(rows, length) < ignored] = -100
    inputs = [torch.randint(0, 7, (rows, length)), torch.randn(rows, dtype=torch.float64)]
    value = torch.randn(rows, dtype=torch.float64) + shift
    return {"inputs": inputs, "labels": Labels(labels, value), "temperature": 0.5, "none": None}


def token_loss(model: nn.Module, batch: dict) -> Tensor:
    logits, _ = model(*batch["inputs"])
    return F.cross_entropy(logits.flatten(0, 1) * batch["temperature"], batch["labels"].tokens.flatten())


def value_loss(model: nn.Module, batch: dict) -> Tensor:
    _, value = model(*batch["inputs"])
    return F.mse_loss(value, batch["labels"].value)


models = st.fixed_dictionaries(
    {name: st.booleans() for name in ("sparse", "shared", "frozen", "unused")} | {"width": st.sampled_from([1, 4])}
)
batches = st.fixed_dictionaries(
    {
        "rows": st.integers(1, 20),
        "length": st.integers(1, 5),
        "shift": st.sampled_from([0.0, 1e4]),
        "ignored": st.sampled_from([0.0, 0.5]),
    }
)
sizes = st.one_of(st.none(), st.integers(1, 24))


def has_labels(batch: dict) -> bool:
    return bool((batch["labels"].tokens != -100).any())


@given(models, batches, sizes, st.integers(0, 2**16))
def test_the_gradient_is_that_of_the_whole_batch_for_a_mean_over_samples(
    exact, model_options, batch_options, size, seed
):
    torch.manual_seed(seed)
    model, batch = Net(**model_options), make_batch(**batch_options)
    result = exact(model, value_loss, batch, micro_batch_size=size)
    torch.testing.assert_close(result.loss, value_loss(model, batch).detach(), rtol=1e-12, atol=0)


@given(models, batches, sizes, st.integers(0, 2**16))
def test_the_gradient_is_that_of_the_whole_batch_for_a_mean_over_tokens(
    exact, model_options, batch_options, size, seed
):
    torch.manual_seed(seed)
    model, batch = Net(**model_options), make_batch(**batch_options)
    weight = gradfold.token_count(lambda batch: batch["labels"].tokens)
    if not has_labels(batch):
        result = gradfold.Accumulator(model, token_loss, micro_batch_size=size, weight=weight).backward(batch)
        assert gradients(model) == {} and result.is_empty and result.loss.isnan()
        return
    result = exact(model, token_loss, batch, micro_batch_size=size, weight=weight)
    torch.testing.assert_close(result.loss, token_loss(model, batch).detach(), rtol=1e-12, atol=0)


@given(models, batches, sizes, st.integers(0, 2**16))
def test_every_loss_term_has_its_own_denominator(model_options, batch_options, size, seed):
    torch.manual_seed(seed)
    model, batch = Net(**model_options), make_batch(**batch_options)

    def loss_fn(model, batch):
        return {"token": 3 * token_loss(model, batch), "value": value_loss(model, batch)}

    def whole(model):  # a term over nothing is left out of the sum
        return sum(term for term in loss_fn(model, batch).values() if not term.isnan())

    expected = full_batch_gradient(model, whole)
    weight = {"token": gradfold.token_count(lambda batch: batch["labels"].tokens), "value": "samples"}
    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, weight=weight).backward(batch)
    if has_labels(batch):
        assert relative_error(gradients(model), expected) <= TOLERANCE
    else:  # the full batch has zeros where nothing arrives, gradfold may have nothing
        found = {name: gradients(model).get(name, torch.zeros_like(value)) for name, value in expected.items()}
        assert relative_error(found, expected) <= TOLERANCE
    torch.testing.assert_close(result.loss, whole(model).detach(), rtol=1e-12, atol=0)


@given(batches, st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 2**16))
def test_any_cut_and_order_of_a_window_gives_the_same_gradient(batch_options, cuts, seed):
    """Micro-batches of any sizes, permuted: as a loader of micro-batches may give them."""
    torch.manual_seed(seed)
    model = Net(4, sparse=False, shared=True, frozen=False, unused=True)
    batch = make_batch(**{**batch_options, "rows": sum(cuts), "ignored": 0.0})
    expected = full_batch_gradient(model, lambda model: value_loss(model, batch))
    starts = [sum(cuts[:index]) for index in range(len(cuts))]
    parts = [rows_of(batch, start, start + cut) for start, cut in zip(starts, cuts, strict=True)]
    random.Random(seed).shuffle(parts)
    (window,) = gradfold.windows(parts, len(parts))
    gradfold.Accumulator(model, value_loss).backward(window)
    assert relative_error(gradients(model), expected) <= TOLERANCE


def rows_of(batch: dict, start: int, stop: int) -> dict:
    cut = slice(start, stop)
    labels = Labels(batch["labels"].tokens[cut], batch["labels"].value[cut])
    return {**batch, "inputs": [tensor[cut] for tensor in batch["inputs"]], "labels": labels}


@given(st.integers(1, 33), st.integers(1, 33), st.integers(0, 2**16))
def test_a_list_of_samples_is_split_and_collated(exact, rows, size, seed):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2).double()
    model.weight.data.mul_(1e-4)  # inputs of 1e4 would make logits of 1e4, whose softmax itself rounds at 1e-12
    samples = [(torch.randn(3, dtype=torch.float64) + 1e4, index % 2) for index in range(rows)]

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    exact(model, loss_fn, samples, micro_batch_size=size, collate=torch.utils.data.default_collate)


@given(st.integers(1, 33), st.integers(1, 40), st.lists(st.integers(0, 3), min_size=33, max_size=33))
def test_any_callable_weight_is_the_denominator(exact, rows, size, row_weights):
    """Rows weighed 0 to 3, their weighted mean as the loss; micro-batches may weigh nothing, and so may the batch."""
    torch.manual_seed(rows)
    model = nn.Linear(3, 1).double()
    batch = (torch.randn(rows, 3, dtype=torch.float64) + 1e4, torch.tensor(row_weights[:rows]).double())

    def loss_fn(model, batch):
        inputs, row_weights = batch
        return (model(inputs).squeeze(-1).square() * row_weights).sum() / row_weights.sum()  # 0 / 0 is NaN

    options = {"micro_batch_size": size, "weight": lambda batch: batch[1].sum()}
    if batch[1].any():
        exact(model, loss_fn, batch, **options)
        return
    result = gradfold.Accumulator(model, loss_fn, **options).backward(batch)
    assert gradients(model) == {} and result.num_micro_batches == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ten_micro_batch_sizes_of_33_rows_all_agree(exact, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)
    batch = (torch.randn(33, 8, dtype=dtype), torch.randint(0, 4, (33,)))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    for size in (1, 2, 3, 4, 5, 8, 11, 16, 32, 33):
        result = exact(model, loss_fn, batch, micro_batch_size=size)
        assert result.num_micro_batches == -(-33 // size)


@given(batches, sizes, st.integers(0, 2**16))
def test_metrics_are_those_of_the_whole_batch(batch_options, size, seed):
    torch.manual_seed(seed)
    model, batch = Net(4, sparse=False, shared=False, frozen=False, unused=False), make_batch(**batch_options)

    def loss_fn(model, batch):
        _, value = model(*batch["inputs"])
        error = (value - batch["labels"].value).abs()
        return value_loss(model, batch), {"error": error.mean(), "per row": error, "rows": len(error)}

    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=size).backward(batch)
    _, expected = loss_fn(model, batch)
    torch.testing.assert_close(result.metrics["error"], expected["error"].detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(result.metrics["per row"], expected["per row"].detach(), rtol=1e-12, atol=1e-12)
    assert not result.metrics["error"].requires_grad
