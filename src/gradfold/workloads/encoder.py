"""The workload `encoder`: a small BERT-like Transformer that fills in masked words of docstrings."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gradfold.weight import token_count
from gradfold.workloads.docstrings import read_docstrings
from gradfold.workloads.evaluation import evaluating
from gradfold.workloads.vocabulary import MARK, PAD, Vocabulary
from gradfold.workloads.workload import Workload

__all__: list[str] = []

DESCRIPTION = "Transformer encoder that fills in masked words of Python's docstrings; uneven lengths, mean over tokens"
DATA = "in Python's standard library"

_NUM_SAMPLES = 2200
_HELD_OUT = 11  # one sample in eleven is held out
_NUM_WORDS = 1000
_MAX_TOKENS = 64
_MASKED_FRACTION = 0.15
_IGNORED = -100  # the label that cross_entropy leaves out, at every token that is not masked

# One docstring, or with a leading dimension a batch of them: "tokens" with the masks in place, and "labels".
Sample: TypeAlias = "dict[str, torch.Tensor]"


class Encoder(nn.Module):
    """Token and position embeddings, two Transformer layers, and a score for each word of the vocabulary.

    Dropout is off, unlike in BERT: each micro-batch would draw its own masks, and then an accumulated gradient and
    the full batch's could not be compared.
    """

    def __init__(self, num_tokens: int, width: int = 64, num_heads: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, width, padding_idx=PAD)
        self.positions = nn.Embedding(_MAX_TOKENS, width)
        layer = nn.TransformerEncoderLayer(
            width,
            num_heads,
            dim_feedforward=4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, num_tokens)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, T, num_tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)
        x = self.layers(x, src_key_padding_mask=tokens == PAD)
        logits: torch.Tensor = self.head(x)
        return logits


def masked_token_loss(model: nn.Module, micro_batch: Sample) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy averaged over the masked tokens, with the accuracy on them as a metric."""
    labels = micro_batch["labels"]  # (B, T)
    logits = model(micro_batch["tokens"])  # (B, T, num_tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)
    masked = labels != _IGNORED
    # A product, not logits[masked]: the shape of a selection would have to wait for the device.
    num_correct = ((logits.argmax(dim=2) == labels) & masked).sum()
    return loss, {"accuracy": num_correct / masked.sum()}


def pad(samples: Sequence[Sample]) -> Sample:
    """The batch of some samples, as long as the longest of them."""
    return {
        "tokens": pad_sequence([sample["tokens"] for sample in samples], batch_first=True, padding_value=PAD),
        "labels": pad_sequence([sample["labels"] for sample in samples], batch_first=True, padding_value=_IGNORED),
    }


def held_out_scores(model: nn.Module, samples: Sequence[Sample]) -> dict[str, float]:
    """Accuracy and loss per masked token on held-out samples."""
    device = next(model.parameters()).device
    num_correct, loss, num_masked = 0.0, 0.0, 0
    with evaluating(model):
        for start in range(0, len(samples), 50):
            batch = {name: tensor.to(device) for name, tensor in pad(samples[start : start + 50]).items()}
            mean_loss, metrics = masked_token_loss(model, batch)
            num_tokens = int((batch["labels"] != _IGNORED).sum())
            num_correct += float(metrics["accuracy"]) * num_tokens
            loss += float(mean_loss) * num_tokens
            num_masked += num_tokens
    return {"accuracy": num_correct / num_masked, "loss": loss / num_masked}


def mask(tokens: torch.Tensor, generator: torch.Generator) -> Sample:
    """A sample with 15 % of its tokens masked, one at least, so that no micro-batch has an empty mean."""
    num_masked = max(1, round(_MASKED_FRACTION * len(tokens)))
    chosen = torch.randperm(len(tokens), generator=generator)[:num_masked]
    labels = torch.full_like(tokens, _IGNORED)
    labels[chosen] = tokens[chosen]
    return {"tokens": tokens.index_fill(0, chosen, MARK), "labels": labels}


def encoder() -> Workload:
    """Masked word prediction on samples of 1 to 64 tokens: micro-batches of 2 samples, 4 to an update.

    The loss is a mean over masked tokens, of which every micro-batch has another number: the weight is the count of
    the labels. The masks are drawn once, when the data are built, so that whoever trains on them sees the same.

    Raises:
        DataError: this Python comes without the sources of its standard library.
    """
    texts = [words[:_MAX_TOKENS] for words in read_docstrings(_NUM_SAMPLES)]
    train_texts = [words for number, words in enumerate(texts) if number % _HELD_OUT]
    vocabulary = Vocabulary.of_most_frequent(train_texts, _NUM_WORDS)
    generator = torch.Generator().manual_seed(0)
    train = [mask(torch.tensor(vocabulary.encode(words)), generator) for words in train_texts]
    test = [mask(torch.tensor(vocabulary.encode(words)), generator) for words in texts[::_HELD_OUT]]
    return Workload(
        name="encoder",
        description=DESCRIPTION,
        make_model=partial(Encoder, num_tokens=len(vocabulary)),
        loss_fn=masked_token_loss,
        make_optimizer=partial(torch.optim.AdamW, lr=1e-3),
        train_data=train,
        global_batch_size=8,
        micro_batch_size=2,
        weight=token_count("labels"),
        collate=pad,
        evaluate=partial(held_out_scores, samples=test),
        facts={
            "data": f"docstrings of the standard library of Python {platform.python_version()}",
            "training samples": f"{len(train):,} of up to {_MAX_TOKENS} tokens",
            "held-out samples": f"{len(test):,}",
            "vocabulary": f"{len(vocabulary):,} tokens",
        },
    )
