"""The workload `matching`: two encoders that tell which German sentence says what an English one says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gradfold.coupled.two_phase import TwoPhaseLoss
from gradfold.losses import info_nce
from gradfold.workloads.evaluation import evaluating
from gradfold.workloads.multi30k import read_pairs
from gradfold.workloads.vocabulary import PAD, Vocabulary
from gradfold.workloads.words import words_of
from gradfold.workloads.workload import Workload

__all__: list[str] = []

DESCRIPTION = "two Transformer encoders that match English to German captions of Multi30k by InfoNCE, a TwoPhaseLoss"
DATA = "--data DIR with Multi30k (train.en.gz, train.de.gz, test_2016_flickr.en.gz, test_2016_flickr.de.gz)"

_LANGUAGES = ("en", "de")
_NUM_WORDS = 3000
_MAX_WORDS = 24
_SLICE_ROWS = 500

# One pair of sentences by language, or with a leading dimension a batch of them, padded.
Sample: TypeAlias = "dict[str, Tensor]"


class SentenceEncoder(nn.Module):
    """Word and position embeddings, a Transformer layer, and the mean over the words as a unit vector."""

    def __init__(self, num_tokens: int, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(num_tokens, width, padding_idx=PAD)
        self.positions = nn.Embedding(_MAX_WORDS, width)
        self.layer = nn.TransformerEncoderLayer(
            width, 2, dim_feedforward=2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(width, width)
        for embedding in (self.words, self.positions):
            nn.init.normal_(embedding.weight, std=0.05)

    def forward(self, words: Tensor) -> Tensor:  # (B, T) -> (B, width)
        is_padding = words == PAD
        x = self.words(words) + self.positions.weight[: words.shape[1]]
        x = self.layer(x, src_key_padding_mask=is_padding)
        x = x.masked_fill(is_padding[:, :, None], 0).sum(dim=1) / (~is_padding).sum(dim=1, keepdim=True)
        return F.normalize(self.head(x), dim=1)


class Matcher(nn.Module):
    """An encoder for each language, and the scale of their scores, which is trained too (CLIP, arXiv 2103.00020)."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({language: SentenceEncoder(num_tokens) for language in _LANGUAGES})
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def forward(self, batch: Sample) -> tuple[Tensor, ...]:
        return tuple(self.encoders[language](batch[language]) for language in _LANGUAGES)


def embed(model: nn.Module, micro_batch: Sample) -> tuple[Tensor, Tensor]:
    """The statistic: English and German embeddings (B, width) of some pairs."""
    english, german = model(micro_batch)
    return english, german


def contrast(model: nn.Module, embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of the whole batch: each sentence told apart from all of the other language, in both directions."""
    assert isinstance(model, Matcher)
    return info_nce(*embeddings, temperature=(-model.log_scale).exp(), tile=256)


def pad(samples: Sequence[Sample]) -> Sample:
    """Collates samples into (B, T) of each language, where T is the length of the longest."""
    return {
        language: pad_sequence([sample[language] for sample in samples], batch_first=True, padding_value=PAD)
        for language in _LANGUAGES
    }


def recall(model: nn.Module, samples: Sequence[Sample]) -> dict[str, float]:
    """Recall@1: how often a sentence's own translation scores highest of all, the mean of both directions."""
    device = next(model.parameters()).device
    slices = [samples[start : start + _SLICE_ROWS] for start in range(0, len(samples), _SLICE_ROWS)]
    with evaluating(model):
        batches = [{language: words.to(device) for language, words in pad(part).items()} for part in slices]
        english, german = (torch.cat(column) for column in zip(*map(model, batches), strict=True))
        scores = english @ german.T
        own = torch.arange(len(scores), device=device)
        num_right = sum(int((scores.argmax(dim=dim) == own).sum()) for dim in (0, 1))
    return {"recall_at_1": num_right / (2 * len(samples))}


def matching(data: Path | None = None) -> Workload:
    """Contrastive training: micro-batches of 32 pairs, 16 to an update, of which each sees the negatives of all 512.

    Plain accumulation would tell each sentence apart from 31 others, which is an easier task, and learns less.

    Args:
        data: the folder with Multi30k's files.

    Raises:
        DataError: no folder is given, or a file is missing or damaged.
    """
    train_texts, test_texts = (
        [(words_of(first), words_of(second)) for first, second in read_pairs(data, part, _LANGUAGES)]
        for part in ("train", "test_2016_flickr")
    )
    english, german = (
        Vocabulary.of_most_frequent(sentences, _NUM_WORDS, num_marks=0) for sentences in zip(*train_texts, strict=True)
    )
    train, test = (
        [
            {
                language: torch.tensor(vocabulary.encode(words[:_MAX_WORDS]))
                for language, vocabulary, words in zip(_LANGUAGES, (english, german), pair, strict=True)
            }
            for pair in part
        ]
        for part in (train_texts, test_texts)
    )
    return Workload(
        name="matching",
        description=DESCRIPTION,
        make_model=partial(Matcher, num_tokens=max(len(english), len(german))),
        loss_fn=TwoPhaseLoss(embed, contrast),
        # With the default eps of 1e-8 rounding errors in the gradients of rare words become whole steps.
        make_optimizer=partial(torch.optim.Adam, lr=1e-3, eps=1e-6),
        train_data=train,
        global_batch_size=512,
        micro_batch_size=32,
        num_epochs=2,
        collate=pad,
        evaluate=partial(recall, samples=test),
        facts={
            "data": "Multi30k (Elliott et al., 2016), English and German captions",
            "training samples": f"{len(train):,} pairs",
            "held-out samples": f"{len(test):,} pairs",
            "vocabulary": f"{len(english):,} English and {len(german):,} German tokens",
        },
    )
