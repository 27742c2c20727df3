"""What was built apart goes together, or is refused by name: ways to cut, to couple, to drop out, to normalize."""

from __future__ import annotations

import itertools

import pytest
import torch
from reference import relative_error
from torch import nn
from torch.nn import functional as F

import gradfold

ROWS, LENGTH, WORDS = 13, 9, 11


def batch():
    """Rows of 1 to 9 words, right-padded with 0; numbers to embed them near."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, WORDS, (ROWS, LENGTH), generator=generator)
    lengths = 1 + torch.arange(ROWS) * 5 % LENGTH
    words[torch.arange(LENGTH) >= lengths[:, None]] = 0
    return {"words": words, "targets": torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)}


def lengths(batch):
    return (batch["words"] != 0).sum(1)


class Encoder(nn.Module):
    """The mean of the words of a row, then layers."""

    def __init__(self, normalizes, drops):
        super().__init__()
        self.words = nn.Embedding(WORDS, 4, padding_idx=0)
        self.layers = nn.Sequential(
            nn.Linear(4, 6),
            nn.BatchNorm1d(6) if normalizes else nn.Identity(),
            nn.Tanh(),
            nn.Dropout(0.5) if drops else nn.Identity(),
            nn.Linear(6, 4),
        )

    def forward(self, words):
        mask = (words != 0)[..., None]
        return self.layers((self.words(words) * mask).sum(1) / mask.sum(1))


def plain(model, batch):
    return F.mse_loss(model(batch["words"]), batch["targets"])


def embed(model, batch):
    return model(batch["words"]), batch["targets"]


def match(model, embeddings):
    return gradfold.losses.info_nce(*embeddings, temperature=0.7)


SPLITS = {
    "rows": {"micro_batch_size": 3},
    "tokens": {"batching": gradfold.TokenBudget(14, lengths=lengths)},
    "auto": {"micro_batch_size": gradfold.Auto(cache=False, seconds=0.05)},
    "auto tokens": {"batching": gradfold.TokenBudget("auto", lengths=lengths)},
}
LOSSES = {"plain": plain, "two phases": gradfold.TwoPhaseLoss(embed, match)}
REFUSAL = r"not supported with|TokenBudget (takes|changes the order of) rows"
REFUSED = {  # (loss, normalizes, drops)
    ("two phases", True, False),
    ("two phases", True, True),
    ("plain", True, True),
}


def is_refused(cut, loss, normalizes, drops):
    """What would see rows in another order, or statistics with other padding, does not go with a token budget."""
    return (loss, bool(normalizes), bool(drops)) in REFUSED or ("tokens" in cut and (normalizes or loss != "plain"))


@pytest.fixture(autouse=True)
def cache_of_choices(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADFOLD_CACHE_DIR", str(tmp_path))


def make(normalizes, drops):
    torch.manual_seed(1)
    model = Encoder(normalizes, drops).double()
    return gradfold.convert_dropout(model, seed=3) if drops else model


def gradients(model):
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize(("cut", "loss", "normalizes", "drops"), [*itertools.product(SPLITS, LOSSES, (0, 1), (0, 1))])
def test_ways_to_cut_and_to_couple(cut, loss, normalizes, drops):
    options = {"batch_norm": "exact" if normalizes else None}
    model, whole = make(normalizes, drops), make(normalizes, drops)
    if is_refused(cut, loss, normalizes, drops):
        with pytest.raises(gradfold.OptionError, match=REFUSAL):
            gradfold.Accumulator(model, LOSSES[loss], **SPLITS[cut], **options).backward(batch())
        return
    accumulator = gradfold.Accumulator(model, LOSSES[loss], **SPLITS[cut], **options)
    result = accumulator.backward(batch())
    assert "auto" in cut or result.num_micro_batches > 2
    if drops:  # the masks are those of the batch as a whole
        expected = gradfold.Accumulator(whole, LOSSES[loss], self_check=False).backward(batch()).loss
    else:
        expected = LOSSES[loss](whole, batch())
        expected.backward()
    assert relative_error(gradients(model), gradients(whole)) < 1e-12
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-12, atol=0)
    for found, buffer in zip(model.buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(found, buffer, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("cut", "loss"), [("rows", "plain"), ("rows", "two phases"), ("tokens", "plain")])
def test_verify_holds_each(cut, loss):
    accumulator = gradfold.Accumulator(make(False, True), LOSSES[loss], **SPLITS[cut])
    verdict = gradfold.verify(accumulator, batch())
    assert verdict.ok, str(verdict)


def moments(model, batch):
    found = model(batch["words"])
    return found.sum(0), found.square().sum(0)


def spread(model, sums):
    return (sums[1] / ROWS - (sums[0] / ROWS).square()).sum()


def test_sums_know_no_order_and_go_with_a_token_budget():
    loss_fn = gradfold.TwoPhaseLoss(moments, spread, combine="sum")
    model, whole = make(False, False), make(False, False)
    gradfold.Accumulator(model, loss_fn, **SPLITS["tokens"]).backward(batch())
    loss_fn(whole, batch()).backward()
    assert relative_error(gradients(model), gradients(whole)) < 1e-12


def test_a_budget_that_sets_itself_is_in_the_state():
    accumulator = gradfold.Accumulator(make(False, False), plain, **SPLITS["auto tokens"])
    accumulator.backward(batch())
    budget, rows = accumulator.token_budget, accumulator.micro_batch_choice.micro_batch_size
    assert budget.max_tokens == rows * LENGTH
    resumed = gradfold.Accumulator(make(False, False), plain, **SPLITS["auto tokens"])
    resumed.load_state_dict(accumulator.state_dict())
    assert resumed.token_budget == budget
