"""The law under a token budget: whatever the lengths, weights and orders, .grad is that of the unsorted batch."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import full_batch_gradient, gradients, relative_error
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import gradfold

F = nn.functional
TOLERANCE = 1e-12
settings.register_profile("gradfold", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("gradfold")


class Model(nn.Module):
    """Causal attention over a target, with one vector of the source, read with its mask; shared and frozen parts."""

    def __init__(self, shared: bool, frozen: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6)
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 9)
        if shared:
            self.head.weight = self.tokens.weight
        if frozen:
            self.key.requires_grad_(False)
        self.double()

    def forward(self, source, target, shift):  # (B, S), (B, T), (B,) -> (B, T, 9)
        mask = (source > 0).double()[..., None]
        read = (self.tokens(source) * mask).sum(1) / mask.sum(1).clamp(min=1)
        x = self.norm(self.tokens(target) + read[:, None] + 1e-4 * shift[:, None, None])
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.head(x + scores.masked_fill(future, -1e9).softmax(-1) @ x)


def loss_fn(model, batch):
    logits, labels = model(batch["source"], batch["target"], batch["shift"]), batch["labels"]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B, T), 0 where ignored
    per_row = losses.sum(1)
    weighed = (per_row * batch["weight"]).sum() / batch["weight"].sum()
    return {"token": losses.sum() / (labels != -100).sum(), "row": weighed}, {"per row": per_row}


WEIGHTS = {"token": gradfold.token_count("labels"), "row": lambda batch: batch["weight"].sum(), "per row": "samples"}


def make_samples(lengths, generator):
    return [
        {
            "source": torch.randint(1, 9, (source,), generator=generator),
            "target": torch.randint(1, 9, (target,), generator=generator),
            "labels": torch.randint(0, 9, (target,), generator=generator),
            "weight": torch.tensor(float(weight), dtype=torch.float64),
            "shift": torch.tensor(1e4 + source, dtype=torch.float64),
        }
        for source, target, weight in lengths
    ]


def collate(samples, extra=0):
    """Padded to the longest, and some more."""
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("weight", "shift")}
    for name, value in (("source", 0), ("target", 0), ("labels", -100)):
        padded = pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)
        batch[name] = F.pad(padded, (0, extra), value=value)
    return batch


def lengths_of(samples):
    return {name: [len(sample[name]) for sample in samples] for name in ("source", "target")}


rows = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 3))
batches = st.lists(rows, min_size=1, max_size=24).filter(
    lambda rows: any(target for _, target, _ in rows) and any(weight for _, _, weight in rows)
)
budgets = st.integers(1, 120)
costs = st.sampled_from([0.0, 2.0, 1e6])


def check(model, budget, batch, expected, expected_rows, **options):
    accumulator = gradfold.Accumulator(model, loss_fn, batching=budget, weight=WEIGHTS, self_check=False, **options)
    result = accumulator.backward(batch)
    found = gradients(model)
    found = {name: found.get(name, torch.zeros_like(value)) for name, value in expected.items()}
    assert relative_error(found, expected) <= TOLERANCE
    torch.testing.assert_close(result.metrics["per row"], expected_rows, rtol=1e-12, atol=1e-12)


def whole_loss(model, whole):
    return sum(loss_fn(model, whole)[0].values())


@settings(suppress_health_check=[], max_examples=60)
@given(batches, budgets, costs, st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_lists_of_samples(lengths, max_tokens, cost, shared, frozen, seed):
    torch.manual_seed(seed)
    random.Random(seed).shuffle(lengths)
    model, samples = Model(shared, frozen), make_samples(lengths, torch.Generator().manual_seed(seed))
    whole = collate(samples)
    expected = full_batch_gradient(model, lambda model: whole_loss(model, whole))
    budget = gradfold.TokenBudget(max(max_tokens, 24), lengths=lengths_of, cost=cost)
    check(model, budget, samples, expected, loss_fn(model, whole)[1]["per row"].detach(), collate=collate)


@given(batches, budgets, costs, st.integers(0, 5), st.integers(0, 2**16))
def test_padded_tensors(lengths, max_tokens, cost, extra, seed):
    torch.manual_seed(seed)
    model, samples = Model(True, False), make_samples(lengths, torch.Generator().manual_seed(seed))
    whole = collate(samples, extra)
    expected = full_batch_gradient(model, lambda model: whole_loss(model, whole))
    trim = {"source": {"source": 1}, "target": {"target": 1, "labels": 1}}
    found = {name: torch.tensor(column) for name, column in lengths_of(samples).items()}
    budget = gradfold.TokenBudget(max(max_tokens, 24), lengths=lambda batch: found, cost=cost, trim=trim)
    check(model, budget, whole, expected, loss_fn(model, whole)[1]["per row"].detach())


@given(st.lists(st.integers(0, 15), min_size=1, max_size=20), st.integers(15, 60), st.integers(0, 2**16))
def test_one_length_per_row_found_in_the_batch(lengths, max_tokens, seed):
    """Only the tokens, whose padding is found; a mean over tokens."""
    torch.manual_seed(seed)
    if not any(lengths):
        lengths = [*lengths, 3]
    embedding = nn.Embedding(9, 5).double()
    samples = [torch.randint(1, 9, (length,)) for length in lengths]
    whole = {"ids": F.pad(pad_sequence(samples, batch_first=True), (0, seed % 3))}

    def loss(model, batch):
        valid = batch["ids"] > 0
        return (model(batch["ids"]).pow(3).sum(-1) * valid).sum() / valid.sum()

    expected = full_batch_gradient(embedding, lambda model: loss(model, whole))
    budget = gradfold.TokenBudget(max_tokens, lengths=lambda batch: (batch["ids"] > 0).sum(1), cost=1)
    weight = gradfold.token_count("ids", ignore_index=0)
    gradfold.Accumulator(embedding, loss, batching=budget, weight=weight, self_check=False).backward(whole)
    assert relative_error(gradients(embedding), expected) <= TOLERANCE
