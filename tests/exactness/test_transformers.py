"""Models of transformers under a token budget, padded on the right, as its data collators pad.

The causal models' own loss is computed in float32, whatever the model's precision, which alone moves a gradient by
6e-8. So the law is shown with a loss in float64 on their logits, and their own loss is held to that noise.
"""

from __future__ import annotations

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch.nn import functional as F

import gradfold

transformers = pytest.importorskip("transformers", reason="transformers is not installed; the dev extra has it")
pytestmark = pytest.mark.slow

NUM_TOKENS, IGNORED = 50, -100
LENGTHS = [3, 17, 5, 9, 2, 12, 4, 4, 30, 7, 6, 1]


def llama():
    config = transformers.LlamaConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=NUM_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(
        vocab_size=NUM_TOKENS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    return transformers.BertForMaskedLM(config)


MODELS = {"llama": (llama, 1), "gpt2": (gpt2, 1), "bert": (bert, 0)}  # and by how many tokens labels are ahead


def make_batch(generator):
    """Padded to a multiple of 8, as `DataCollatorWithPadding(pad_to_multiple_of=8)` does."""
    ids = torch.zeros(len(LENGTHS), 32, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = torch.randint(1, NUM_TOKENS, (length,), generator=generator)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)}


def loss_in_float64(model, batch, ahead):
    inputs = {name: leaf for name, leaf in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    if ahead:
        logits, labels = logits[:, :-ahead], labels[:, ahead:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def own_loss(model, batch, ahead):
    return model(**batch).loss


@pytest.mark.parametrize(("loss", "tolerance"), [(loss_in_float64, 1e-12), (own_loss, 1e-6)])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_padded_batch(exact, name, loss, tolerance):
    make, ahead = MODELS[name]
    torch.manual_seed(0)
    model = make().double().train()
    batch = make_batch(torch.Generator().manual_seed(0))
    result = exact(
        model,
        lambda model, batch: loss(model, batch, ahead),
        batch,
        tolerance=tolerance,
        batching=gradfold.TokenBudget(64, lengths=lambda batch: batch["attention_mask"].sum(1), cost=8),
        weight=gradfold.token_count("labels", shift=bool(ahead)),
    )
    assert result.num_micro_batches > 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_their_loss_over_num_items_in_batch_adds_up(exact, name):
    make, _ = MODELS[name]
    torch.manual_seed(0)
    batch = make_batch(torch.Generator().manual_seed(0))
    batch["num_items_in_batch"] = (batch["labels"][:, 1:] != IGNORED).sum()
    result = exact(
        make().double().train(),
        lambda model, batch: own_loss(model, batch, 1),
        batch,
        tolerance=1e-6,
        micro_batch_size=5,
        weight="sum",
    )
    assert result.num_micro_batches == 3


def test_a_mask_of_bert_that_is_forgotten_is_refused():
    torch.manual_seed(0)
    batch = make_batch(torch.Generator().manual_seed(0))
    accumulator = gradfold.Accumulator(
        bert().double(),
        lambda model, batch: loss_in_float64(model, {**batch, "attention_mask": None}, 0),
        batching=gradfold.TokenBudget(64, lengths=lambda batch: batch["attention_mask"].sum(1), cost=8),
        weight=gradfold.token_count("labels"),
    )
    with pytest.raises(gradfold.PaddingError, match=r"bert\.encoder\.layer\.0\.attention"):
        accumulator.backward(batch)


def test_gpt2_padded_on_the_left_needs_its_positions():
    torch.manual_seed(0)
    batch = {name: leaf.flip(1) for name, leaf in make_batch(torch.Generator().manual_seed(0)).items()}
    model = gpt2().double()
    expected = {}
    for positions in (False, True):
        if positions:
            batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            expected = full_batch_gradient(model, lambda model: loss_in_float64(model, batch, 1))
        accumulator = gradfold.Accumulator(
            model,
            lambda model, batch: loss_in_float64(model, batch, 1),
            batching=gradfold.TokenBudget(
                64, lengths=lambda batch: batch["attention_mask"].sum(1), padding_side="left", cost=8
            ),
            weight=gradfold.token_count("labels", shift=True),
        )
        if not positions:
            with pytest.raises(gradfold.PaddingError, match="pass position_ids with the batch"):
                accumulator.backward(batch)
            continue
        accumulator.backward(batch)
        assert relative_error(gradients(model), expected) <= 1e-12
