"""Sequences packed into one row: cut at their boundaries, with the gradient of the whole batch."""

from __future__ import annotations

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold import Packed

F = nn.functional
VOCABULARY = 7


class LanguageModel(nn.Module):
    """Attention within sequences, by `position_ids` or boundaries."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.places = nn.Embedding(VOCABULARY, 6), nn.Embedding(8, 6)
        self.head = nn.Linear(6, VOCABULARY)
        self.double()

    def forward(self, ids, positions, bounds=None):
        hidden = self.tokens(ids) + self.places(positions)  # (1, tokens, 6)
        if bounds is None:
            number = (positions == 0).cumsum(1)
        else:
            number = torch.bucketize(torch.arange(ids.shape[1]), bounds[1:], right=True)[None]
        is_seen = (number[..., None] == number[:, None]).tril()
        return self.head(F.scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=is_seen))


def flattened(*lengths, with_bounds=False):
    """What a flattening collator makes: the first token of each sequence is not predicted."""
    total, generator = sum(lengths), torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (1, total), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    batch = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}
    if with_bounds:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds.clone(), "max_length_q": max(lengths)}
        batch["max_length_k"] = max(lengths)
    return batch


def loss_fn(model, batch):
    bounds = batch.get("cu_seq_lens_q")
    logits = model(batch["input_ids"], batch["position_ids"], bounds)
    if bounds is not None:
        lengths = bounds.diff()
        assert batch["max_length_q"] == batch["max_length_k"] == int(lengths.max()) and bounds.dtype == torch.int32
        assert torch.equal(bounds, batch["cu_seq_lens_k"]) and bounds[-1] == batch["input_ids"].shape[1]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


TOKENS = gradfold.token_count("labels", shift=True)


@pytest.mark.parametrize("with_bounds", [False, True])
@pytest.mark.parametrize(
    ("lengths", "size", "num_parts"),
    [((3, 5, 2, 6, 4), 2, 3), ((4, 2, 7), 1, 3), ((5, 3), 5, 1), ((3, 1, 4), 2, 2)],
)
def test_the_gradient_is_that_of_the_whole_batch(lengths, size, num_parts, with_bounds):
    batch, model = flattened(*lengths, with_bounds=with_bounds), LanguageModel()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    batching = Packed(cu_seqlens="cu_seq_lens_q") if with_bounds else Packed()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, batching=batching, weight=TOKENS)
    result = accumulator.backward(batch)
    assert relative_error(gradients(model), expected) < 1e-12
    assert (result.num_micro_batches, result.num_samples) == (num_parts, len(lengths))


def test_a_wrong_weight_is_refused():
    accumulator = gradfold.Accumulator(LanguageModel(), loss_fn, micro_batch_size=3, batching=Packed())
    with pytest.raises(gradfold.NotDecomposableError):
        accumulator.backward(flattened(3, 7, 2, 6, 4, 5))


def test_memory_that_runs_out_halves_between_sequences():
    def hungry(model, batch):
        if batch["input_ids"].shape[1] > 8:
            raise torch.OutOfMemoryError("injected")
        return loss_fn(model, batch)

    batch, model = flattened(3, 5, 2, 6), LanguageModel()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    accumulator = gradfold.Accumulator(model, hungry, batching=Packed(), weight=TOKENS, self_check=False)
    assert accumulator.backward(batch).recoveries
    assert relative_error(gradients(model), expected) < 1e-12


def test_the_proof():
    accumulator = gradfold.Accumulator(LanguageModel(), loss_fn, micro_batch_size=2, batching=Packed(), weight=TOKENS)
    verdict = gradfold.verify(accumulator, flattened(3, 5, 2, 6, 4))
    assert verdict.ok, str(verdict)


@pytest.mark.parametrize(
    ("batch", "batching", "message"),
    [
        (flattened(3, 2), Packed(cu_seqlens="cu"), "finds no tensor 'cu'"),
        (torch.zeros(3), Packed(), "finds no tensor 'position_ids'"),
        ({**flattened(3, 2), "images": torch.zeros(2, 3)}, Packed(), r"batch\['images'\], a Tensor of shape \(2, 3\)"),
        ({**flattened(3, 2), "position_ids": torch.ones(1, 5)}, Packed(), "gives no sequences"),
    ],
)
def test_what_is_not_packed_is_refused(batch, batching, message):
    accumulator = gradfold.Accumulator(LanguageModel(), loss_fn, micro_batch_size=1, batching=batching)
    with pytest.raises(gradfold.BatchError, match=message):
        accumulator.backward(batch)
