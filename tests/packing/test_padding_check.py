"""A model or loss that depends on how far rows are padded is refused under a token budget, by name."""

from __future__ import annotations

import random

import pytest
import torch
from reference import assert_same_state, full_batch_gradient, gradients, relative_error, state
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import gradfold
from gradfold.errors import BatchError, OptionError, PaddingError

F = nn.functional
LENGTHS = [3, 11, 2, 5, 4, 3, 9, 2]


def pad(rows, side, value):
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def make_batch(side="right", lengths=LENGTHS):
    torch.manual_seed(0)
    rows = [torch.randint(1, 9, (length,)) for length in lengths]
    mask = pad([torch.ones(length, dtype=torch.long) for length in lengths], side, 0)
    position_ids = (
        (mask.cumsum(1) - 1).clamp(min=0) if side == "left" else torch.arange(mask.shape[1]).expand(mask.shape)
    )
    return {"ids": pad(rows, side, 0), "labels": pad(rows, side, -100), "mask": mask, "position_ids": position_ids}


class Decoder(nn.Module):
    """One head of causal attention over token and position embeddings."""

    def __init__(self, positions="none", masks=True):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 8), nn.Embedding(12, 8)
        self.query, self.key, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        self.where, self.masks = positions, masks
        self.double()

    def forward(self, batch):
        ids = batch["ids"]
        x = self.tokens(ids)
        if self.where == "counted":
            x = x + self.positions.weight[: ids.shape[1]]
        elif self.where == "given":
            x = x + self.positions(batch["position_ids"])
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()[None]
        if self.masks:
            seen = seen & batch["mask"].bool()[:, None] | torch.eye(ids.shape[1], dtype=torch.bool)
        scores = (self.query(x) @ self.key(x).transpose(1, 2)).masked_fill(~seen, -1e9)
        return self.head(x + scores.softmax(-1) @ x)


def next_token_loss(model, batch):
    logits, labels = model(batch)[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


WEIGHT = gradfold.token_count("labels", shift=True)


def make_accumulator(model, loss_fn=next_token_loss, side="right", weight=WEIGHT, **options):
    trim = options.pop("trim", ("position_ids",))
    lengths = options.pop("lengths", lambda batch: batch["mask"].sum(1))
    budget = gradfold.TokenBudget(24, lengths=lengths, padding_side=side, trim=trim, cost=1)
    return gradfold.Accumulator(model, loss_fn, batching=budget, weight=weight, **options)


@pytest.mark.parametrize("positions", ["none", "counted", "given"])
@pytest.mark.parametrize("masks", [True, False])
def test_a_causal_model_with_padding_on_the_right_is_exact(positions, masks):
    torch.manual_seed(1)
    model, batch = Decoder(positions, masks), make_batch()
    expected = full_batch_gradient(model, lambda model: next_token_loss(model, batch))
    before = state(model)
    make_accumulator(model).backward(batch)
    assert relative_error(gradients(model), expected) <= 1e-12
    assert torch.equal(torch.get_rng_state(), before["random"])


def test_padding_on_the_left_is_exact_with_masks_and_given_positions():
    torch.manual_seed(1)
    model, batch = Decoder("given"), make_batch("left")
    expected = full_batch_gradient(model, lambda model: next_token_loss(model, batch))
    for options in ({}, {"self_check": False}):
        model.zero_grad()
        make_accumulator(model, side="left", **options).backward(batch)
        assert relative_error(gradients(model), expected) <= 1e-12


def test_positions_counted_from_padding_on_the_left_are_refused():
    torch.manual_seed(1)
    batch = make_batch("left")
    with pytest.raises(PaddingError, match=r"depends on how far rows are padded.*pass position_ids with the batch"):
        make_accumulator(Decoder("counted"), side="left").backward(batch)
    del batch["position_ids"]
    accumulator = make_accumulator(Decoder("counted"), side="left", trim=None, self_check=False)
    with pytest.raises(OptionError, match=r'padding_side="left" without a check needs position_ids in the batch'):
        accumulator.backward(batch)


def test_attention_to_padding_on_the_left_is_refused():
    torch.manual_seed(1)
    with pytest.raises(PaddingError, match="depends on how far rows are padded"):
        make_accumulator(Decoder("given", masks=False), side="left").backward(make_batch("left"))


class Pooled(nn.Module):
    """A class per row, out of the mean over all of its columns: padding dilutes it."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm, self.head = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.double()

    def forward(self, ids):
        return self.head(self.norm(self.tokens(ids)).mean(1))


def class_loss(model, batch):
    return F.cross_entropy(model(batch["ids"]), batch["ids"][:, 0] % 3)


def test_the_layer_is_named_and_no_trace_is_left():
    torch.manual_seed(1)
    model, batch = Pooled(), make_batch()
    before = state(model)
    with pytest.raises(
        PaddingError, match=r"the input of 'head' \(Linear\) depends on how far rows are padded"
    ) as caught:
        make_accumulator(model, class_loss, weight="samples").backward(batch)
    assert caught.value.layer is None and "micro_batch_size=8" in str(caught.value)
    assert_same_state(state(model), before)


class Encoder(nn.Module):
    """Attention in both directions, over padding too."""

    def __init__(self):
        super().__init__()
        self.tokens, self.attention = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 9)
        self.double()

    def forward(self, batch):
        x = self.tokens(batch["ids"])
        return self.head(self.attention(x, x, x)[0])


@pytest.mark.parametrize("is_samples", [False, True])
def test_attention_to_padding_is_refused_in_tensors_and_in_lists_of_samples(is_samples):
    torch.manual_seed(1)
    model, batch, options = Encoder(), make_batch(), {}
    if is_samples:
        rows = [{name: leaf[row, :length] for name, leaf in batch.items()} for row, length in enumerate(LENGTHS)]
        options = {
            "collate": lambda rows: {
                name: pad([row[name] for row in rows], "right", -100 if name == "labels" else 0) for name in rows[0]
            },
            "lengths": lambda rows: [len(row["ids"]) for row in rows],
            "trim": None,
        }
        batch = rows
    with pytest.raises(PaddingError, match=r"the output of 'attention' \(MultiheadAttention\)") as caught:
        make_accumulator(model, **options).backward(batch)
    assert caught.value.layer == "attention" and gradients(model) == {}
    assert ("pad all samples to one length" in str(caught.value)) == is_samples


def test_a_loss_that_counts_padding_is_refused():
    def mean_over_all(model, batch):  # labels of padding are 0, and count
        labels = batch["labels"].clamp(min=0)
        losses = F.cross_entropy(model(batch).transpose(1, 2), labels, reduction="none")
        return losses.sum() / (batch["labels"] != -100).sum()

    torch.manual_seed(1)
    with pytest.raises(PaddingError, match="the loss itself, in what loss_fn does with the model's outputs, depends"):
        make_accumulator(Decoder(), mean_over_all, weight=gradfold.token_count("labels")).backward(make_batch())


def test_a_weight_that_counts_padding_is_refused():
    def mean_over_all(model, batch):
        return model(batch).square().mean()

    with pytest.raises(PaddingError, match=r"weight= returns \d+ for some rows with .* so it counts padding"):
        make_accumulator(Decoder(), mean_over_all, weight=lambda batch: batch["labels"].numel()).backward(make_batch())


def test_a_tensor_that_was_not_found_is_named_as_the_likely_cause():
    batch = make_batch()
    accumulator = make_accumulator(Decoder("given"), trim={"position_ids": ()})
    with pytest.raises(BatchError, match=r"but not without it: RuntimeError.*trim=\(\"position_ids\",\)"):
        accumulator.backward(batch)


def test_dropout_does_not_hide_it_nor_is_it_taken_for_it():
    torch.manual_seed(1)
    right = nn.Sequential(Decoder(), nn.Dropout(0.5))
    make_accumulator(right).backward(make_batch())
    with pytest.raises(PaddingError):
        make_accumulator(nn.Sequential(Encoder(), nn.Dropout(0.5))).backward(make_batch())
    assert right.training and right[1].training


def test_random_numbers_that_cannot_be_handed_on_are_warned_of_once():
    class Noisy(Decoder):
        def forward(self, batch):
            logits = super().forward(batch)
            return logits + torch.randn_like(logits)

    torch.manual_seed(1)
    accumulator = make_accumulator(Noisy())
    with pytest.warns(RuntimeWarning, match="could not be checked .* draws random numbers") as said:
        accumulator.backward(make_batch())
    assert sum("could not be checked" in str(one.message) for one in said) == 1
    accumulator.backward(make_batch())


def test_a_batch_of_one_length_says_nothing_and_the_next_one_is_looked_at():
    torch.manual_seed(1)
    accumulator = make_accumulator(Encoder(), trim=("position_ids",))
    accumulator.backward(make_batch(lengths=[4, 4, 4, 4, 4, 4, 4]))
    with pytest.raises(PaddingError):
        accumulator.backward(make_batch())


def test_verify_names_the_padding():
    torch.manual_seed(1)
    verdict = gradfold.verify(make_accumulator(Encoder()), make_batch())
    assert not verdict.ok and verdict.causes[0].name == "padding" and verdict.causes[0].layers == ("attention",)
    budgeted = [row for row in verdict.sizes if row.unit == "padded tokens"]
    assert [row.size for row in budgeted] == [24] and budgeted[0].error > 0.01
    assert "24 tokens" in str(verdict)
    assert gradfold.verify(make_accumulator(Decoder()), make_batch()).ok


def test_rounding_in_float32_is_not_taken_for_padding():
    for seed in range(3):
        torch.manual_seed(seed)
        make_accumulator(Decoder("counted").float()).backward(
            make_batch(lengths=random.Random(seed).choices(range(1, 12), k=9))
        )


def test_verify_hands_rows_that_run_together_their_own_random_numbers():
    class Scaled(Decoder):
        def forward(self, batch):
            return super().forward(batch) * torch.rand(len(batch["ids"]), 1, 1)

    torch.manual_seed(1)
    verdict = gradfold.verify(make_accumulator(Scaled()), make_batch())
    assert verdict.ok and verdict.notes == () and verdict.sizes[0].num_micro_batches > 2
