"""A batch cut by padded tokens: the same results, what is measured, and what happens where memory runs out."""

from __future__ import annotations

import warnings

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import gradfold
from gradfold.errors import BatchError, DoesNotFitError, OptionError
from gradfold.packing.token_batcher import TokenBatcher

F = nn.functional
LENGTHS = [9, 2, 8, 2, 0, 5, 9, 1, 3, 2, 7, 2, 4]


class Tagger(nn.Module):
    """A score per token, by the token and the ones before it; float64."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 5)
        self.double()

    def forward(self, tokens):  # (B, T) -> (B, T, 5)
        return self.head(self.embedding(tokens).cumsum(1).tanh())


def make_samples(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "tokens": torch.randint(1, 10, (n,), generator=generator),
            "labels": torch.randint(0, 5, (n,), generator=generator),
        }
        for n in lengths
    ]


def collate(samples):
    return {
        "tokens": pad_sequence([sample["tokens"] for sample in samples], batch_first=True),
        "labels": pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=-100),
    }


def loss_fn(model, batch):
    losses = F.cross_entropy(model(batch["tokens"]).transpose(1, 2), batch["labels"], reduction="none")  # (B, T)
    valid = batch["labels"] != -100
    return losses.sum() / valid.sum(), {"tokens of row": valid.sum(1), "loss of row": losses.sum(1)}


def lengths_of_batch(batch):
    return (batch["tokens"] > 0).sum(1)


def lengths_of_samples(samples):
    return [len(sample["tokens"]) for sample in samples]


def make_accumulator(model, max_tokens=20, loss_fn=loss_fn, samples=False, cost=2, **options):
    budget = gradfold.TokenBudget(max_tokens, lengths=lengths_of_samples if samples else lengths_of_batch, cost=cost)
    if samples:
        options["collate"] = collate
    return gradfold.Accumulator(model, loss_fn, batching=budget, weight=gradfold.token_count("labels"), **options)


@pytest.mark.parametrize("is_samples", [False, True])
def test_gradient_loss_and_rows_are_those_of_the_batch_as_it_was(is_samples):
    torch.manual_seed(0)
    model, samples = Tagger(), make_samples()
    whole = collate(samples)
    loss, metrics = loss_fn(model, whole)
    expected = full_batch_gradient(model, lambda model: loss_fn(model, whole)[0])
    accumulator = make_accumulator(model, samples=is_samples)
    result = accumulator.backward(samples if is_samples else whole)
    assert relative_error(gradients(model), expected) <= 1e-12
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=0)
    assert torch.equal(result.metrics["tokens of row"], torch.tensor(LENGTHS))
    torch.testing.assert_close(result.metrics["loss of row"], metrics["loss of row"].detach(), rtol=1e-12, atol=1e-12)
    assert (result.num_samples, result.weight) == (len(LENGTHS), sum(LENGTHS)) and result.num_micro_batches > 2


def test_micro_batches_are_no_longer_than_their_rows_and_within_the_budget():
    split = TokenBatcher(gradfold.TokenBudget(20, lengths=lengths_of_batch, cost=2))
    whole = collate(make_samples())
    parts = split.split(whole)
    assert sorted(row for part in parts for row in part.rows) == list(range(len(LENGTHS)))
    for part in parts:
        assert part.data["tokens"].shape == part.data["labels"].shape == (len(part.rows), part.width)
        assert part.width == max(1, *(LENGTHS[row] for row in part.rows)) and part.size <= 20
        assert torch.equal(part.data["tokens"], whole["tokens"][list(part.rows), : part.width])
    assert max(len(part.rows) for part in parts) >= 4


def test_one_micro_batch_keeps_the_order_of_the_batch_and_copies_nothing_without_need():
    split = TokenBatcher(gradfold.TokenBudget(10_000, lengths=lengths_of_batch, cost=1e6))
    whole = collate(make_samples())
    (part,) = split.split(whole)
    assert part.data is whole and part.rows == range(len(LENGTHS))
    longer = {name: F.pad(tensor, (0, 3), value=tensor[4, 0].item()) for name, tensor in whole.items()}
    (part,) = split.split(longer)
    assert part.rows == range(len(LENGTHS)) and torch.equal(part.data["tokens"], whole["tokens"])


def test_a_row_longer_than_the_budget_runs_alone_which_is_said_once():
    torch.manual_seed(0)
    model, samples = Tagger(), make_samples()
    accumulator = make_accumulator(model, max_tokens=6, samples=True)
    with pytest.warns(
        RuntimeWarning, match=r"a row of 9 tokens is longer than max_tokens=6: such rows run alone"
    ) as said:
        result = accumulator.backward(samples)
    assert len(said) == 1 and said[0].filename == __file__
    assert result.num_micro_batches >= sum(length > 6 for length in LENGTHS)
    accumulator.backward(samples)  # warnings are errors here


def test_a_window_of_lists_is_one_pool_of_samples():
    torch.manual_seed(0)
    model, samples = Tagger(), make_samples()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, collate(samples))[0])
    (window,) = gradfold.windows([samples[:5], samples[5:6], samples[6:]], 3)
    result = make_accumulator(model, samples=True).backward(window)
    assert relative_error(gradients(model), expected) <= 1e-12
    assert torch.equal(result.metrics["tokens of row"], torch.tensor(LENGTHS))
    whole = make_accumulator(Tagger(), samples=True).backward(samples)
    assert result.num_micro_batches == whole.num_micro_batches


def test_a_window_of_padded_batches_numbers_its_rows_through():
    torch.manual_seed(0)
    model, samples = Tagger(), make_samples()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, collate(samples))[0])
    (window,) = gradfold.windows([collate(samples[:6]), collate(samples[6:])], 2)
    result = make_accumulator(model).backward(window)
    assert relative_error(gradients(model), expected) <= 1e-12
    assert torch.equal(result.metrics["tokens of row"], torch.tensor(LENGTHS))


def test_terms_with_denominators_of_their_own():
    torch.manual_seed(0)
    model, whole = Tagger(), collate(make_samples())

    def terms(model, batch):
        loss, metrics = loss_fn(model, batch)
        return {"token": loss, "row": metrics["loss of row"].square().mean()}

    expected = full_batch_gradient(model, lambda model: sum(terms(model, whole).values()))
    budget = gradfold.TokenBudget(20, lengths=lengths_of_batch, cost=2)
    weight = {"token": gradfold.token_count("labels"), "row": "samples"}
    gradfold.Accumulator(model, terms, batching=budget, weight=weight).backward(whole)
    assert relative_error(gradients(model), expected) <= 1e-12


class Memory:
    """Runs out of memory above so many padded tokens."""

    def __init__(self, tokens):
        self.tokens, self.seen = tokens, []

    def __call__(self, model, batch):
        self.seen.append(tuple(batch["tokens"].shape))
        if batch["tokens"].numel() > self.tokens:
            raise MemoryError("full")
        return loss_fn(model, batch)


@pytest.mark.parametrize("is_samples", [False, True])
def test_memory_that_runs_out_halves_the_tokens_not_the_rows(is_samples):
    torch.manual_seed(0)
    model, samples = Tagger(), make_samples()
    whole = collate(samples)
    expected = full_batch_gradient(model, lambda model: loss_fn(model, whole)[0])
    memory = Memory(14)
    accumulator = make_accumulator(model, 40, memory, is_samples, self_check=False)
    result = accumulator.backward(samples if is_samples else whole)
    assert relative_error(gradients(model), expected) <= 1e-12
    assert torch.equal(result.metrics["tokens of row"], torch.tensor(LENGTHS))
    first = result.recoveries[0]
    assert (first.action, first.unit) == ("halved", "padded tokens") and first.micro_batch_size % 9 == 0
    assert "padded tokens at once" in str(first) and set(first.rows) <= set(range(len(LENGTHS)))
    memory.seen.clear()
    model.zero_grad()
    again = accumulator.backward(samples if is_samples else whole)
    assert not again.recoveries and relative_error(gradients(model), expected) <= 1e-12
    assert max(rows for rows, _ in memory.seen) > 2  # short rows still run together


def test_a_row_that_does_not_fit_alone_ends_it():
    accumulator = make_accumulator(Tagger(), 40, Memory(8), self_check=False)
    with pytest.raises(DoesNotFitError, match=r"one row does not fit in memory \(row \d+\): tried .*9 padded tokens"):
        accumulator.backward(collate(make_samples()))


def test_trim_is_for_padded_tensors():
    budget = gradfold.TokenBudget(20, lengths=lengths_of_samples, trim=("tokens",))
    accumulator = gradfold.Accumulator(Tagger(), loss_fn, batching=budget, collate=collate)
    with pytest.raises(OptionError, match="trim= is for padded tensors"):
        accumulator.backward(make_samples())


def test_lengths_of_other_rows_are_refused_and_nothing_is_left():
    model = Tagger()
    budget = gradfold.TokenBudget(20, lengths=lambda batch: [1, 2])
    with pytest.raises(BatchError, match=r"one length for each of the 13 rows"):
        gradfold.Accumulator(model, loss_fn, batching=budget).backward(collate(make_samples()))
    assert gradients(model) == {}


def test_the_second_window_is_measured_once_and_what_it_learned_is_resumed():
    torch.manual_seed(0)
    model, whole = Tagger(), collate(make_samples([30, 28, 30, 2, 2, 2, 2, 2, 1, 1]))
    expected = full_batch_gradient(model, lambda model: loss_fn(model, whole)[0])
    accumulator = make_accumulator(model, 100, cost=None)
    overheads, numbers = [], []
    for _ in range(3):
        model.zero_grad()
        numbers.append(accumulator.backward(whole).num_micro_batches)
        assert relative_error(gradients(model), expected) <= 1e-12
        overheads.append(accumulator.state_dict()["micro_batcher"]["overhead"])
    assert overheads[0] is None and overheads[1] == overheads[2] >= 1.0
    assert numbers[1] == numbers[0] + 3
    resumed = make_accumulator(model, 100, cost=None)
    resumed.load_state_dict(accumulator.state_dict())
    assert resumed.state_dict()["micro_batcher"] == accumulator.state_dict()["micro_batcher"]
    assert resumed.state_dict()["micro_batcher"]["overhead"] == overheads[1]
    fixed = make_accumulator(model, 100, cost=3)
    fixed.load_state_dict(accumulator.state_dict())
    assert fixed.state_dict()["micro_batcher"]["overhead"] == 3


def test_dropout_is_neither_refused_nor_warned_of():
    torch.manual_seed(0)
    model = nn.Sequential(Tagger(), nn.Dropout(0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_accumulator(model).backward(collate(make_samples()))
    assert gradients(model)


@pytest.mark.parametrize("kind", ["packed", "nested"])
def test_what_collate_packs_is_left_as_it_is(kind):
    """Nothing is padded there, and rows of like length may run together all the same."""
    torch.manual_seed(0)
    model, samples = Tagger(), [one for one in make_samples() if len(one["tokens"])]

    def pack(samples):
        rows = [sample["tokens"] for sample in samples]
        if kind == "packed":
            return nn.utils.rnn.pack_sequence(rows, enforce_sorted=False)
        return torch.nested.nested_tensor(rows, layout=torch.jagged)

    def loss_fn(model, batch):
        tokens = batch.data if kind == "packed" else batch.values()
        return model.head(model.embedding(tokens)).square().mean()

    expected = full_batch_gradient(model, lambda model: loss_fn(model, pack(samples)))
    budget = gradfold.TokenBudget(20, lengths=lengths_of_samples, cost=2)
    result = gradfold.Accumulator(
        model,
        loss_fn,
        batching=budget,
        collate=pack,
        weight=lambda batch: len(batch.data) if kind == "packed" else len(batch.values()),
        self_check=kind == "packed",
    ).backward(samples)
    assert relative_error(gradients(model), expected) <= 1e-12 and result.num_micro_batches > 2
