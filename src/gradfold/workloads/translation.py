"""The workloads on sentence pairs: `translation`, and `matching`, which tells translations apart by InfoNCE."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gradfold.losses import info_nce
from gradfold.packing.token_budget import TokenBudget
from gradfold.twophase.loss import TwoPhaseLoss
from gradfold.weights import token_count
from gradfold.workloads.registry import BUILT_IN
from gradfold.workloads.scoring import evaluating, mean_scores, slices, to_model, token_loss
from gradfold.workloads.text_data import MARK, PAD, Vocabulary, column_lengths, pad_columns, read_pairs, words_of
from gradfold.workloads.transformer import EncoderDecoder, SentenceEncoder
from gradfold.workloads.workload import Workload

# One pair of sentences by column, or with a leading dimension a batch of them, padded. The columns of `translation`
# are "source" and "target", which begins and ends with a mark; those of `matching` are the languages.
Pair: TypeAlias = "dict[str, Tensor]"

_NUM_PAIRS = 6000  # of 29,000, so that an epoch takes seconds
_TRANSLATION_MAX_WORDS = 64
_TRANSLATION_ROWS = 32  # of a micro-batch
_LANGUAGES = ("en", "de")
_MATCHING_MAX_WORDS = 24


def translation(data: Path | None = None) -> Workload:
    """Translation at word level: 128 pairs to an update, 32 at once, or the tokens of 32."""
    pairs = [read_pairs(data, part, ("de", "en"))[:_NUM_PAIRS] for part in ("train", "val")]
    texts = [[(source.split(), target.split()) for source, target in part] for part in pairs]
    sources, targets = _vocabularies(texts[0], 2000)
    train, test = (
        [
            {
                "source": torch.tensor(sources.encode(source[:_TRANSLATION_MAX_WORDS])),
                "target": torch.tensor([MARK, *targets.encode(target[:_TRANSLATION_MAX_WORDS]), MARK]),
            }
            for source, target in part
        ]
        for part in texts
    )
    longest = sum(map(max, column_lengths(train).values()))
    weight = token_count("target", ignore_index=PAD, shift=True)
    held_out = list(map(pad_columns, slices(test, 64)))
    max_tokens = _TRANSLATION_MAX_WORDS + 2  # the marks
    return Workload(
        name="translation",
        description=BUILT_IN["translation"].text,
        make_model=partial(EncoderDecoder, len(sources), len(targets), max_tokens=max_tokens),
        loss_fn=translation_loss,
        make_optimizer=partial(torch.optim.AdamW, lr=1e-3),
        train_data=train,
        global_batch_size=128,
        micro_batch_size=_TRANSLATION_ROWS,
        weight=weight,
        collate=pad_columns,
        token_budget=TokenBudget(_TRANSLATION_ROWS * longest, lengths=column_lengths),
        evaluate=partial(mean_scores, loss_fn=translation_loss, batches=held_out, count=weight),
        facts={
            "data": "Multi30k (Elliott et al., 2016), German and English",
            "training samples": f"{len(train):,} pairs of sentences",
            "held-out samples": f"{len(test):,}",
            "vocabulary": f"{len(sources):,} German and {len(targets):,} English tokens",
        },
    )


def translation_loss(model: nn.Module, micro_batch: Pair) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next English word, averaged over words and ends of sentences."""
    target = micro_batch["target"]
    return token_loss(model(micro_batch["source"], target[:, :-1]), target[:, 1:], ignored=PAD)


def _vocabularies(texts: Iterable[tuple[list[str], ...]], num_words: int, num_marks: int = 1) -> list[Vocabulary]:
    """The vocabulary of each language, of that many most frequent words."""
    return [Vocabulary.of_most_frequent(sentences, num_words, num_marks) for sentences in zip(*texts, strict=True)]


class Matcher(nn.Module):
    """An encoder for each language, and the scale of their scores, which is trained too (CLIP, arXiv 2103.00020)."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {language: SentenceEncoder(num_tokens, _MATCHING_MAX_WORDS) for language in _LANGUAGES}
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    def forward(self, batch: Pair) -> tuple[Tensor, ...]:
        return tuple(self.encoders[language](batch[language]) for language in _LANGUAGES)


def matching(data: Path | None = None) -> Workload:
    """Contrastive training: micro-batches of 32 pairs, 16 to an update; each pair sees the negatives of all 512.

    Plain accumulation would tell each sentence apart from 31 others, which is an easier task, and learns less.
    """
    pairs = [read_pairs(data, part, _LANGUAGES) for part in ("train", "test_2016_flickr")]
    texts = [[(words_of(first), words_of(second)) for first, second in part] for part in pairs]
    english, german = _vocabularies(texts[0], 3000, num_marks=0)
    train, test = (
        [
            {
                "en": torch.tensor(english.encode(first[:_MATCHING_MAX_WORDS])),
                "de": torch.tensor(german.encode(second[:_MATCHING_MAX_WORDS])),
            }
            for first, second in part
        ]
        for part in texts
    )
    return Workload(
        name="matching",
        description=BUILT_IN["matching"].text,
        make_model=partial(Matcher, num_tokens=max(len(english), len(german))),
        loss_fn=TwoPhaseLoss(embed, contrast),
        # With the default eps of 1e-8 rounding errors in the gradients of rare words become whole steps.
        make_optimizer=partial(torch.optim.Adam, lr=1e-3, eps=1e-6),
        train_data=train,
        global_batch_size=512,
        micro_batch_size=32,
        num_epochs=2,
        collate=pad_columns,
        evaluate=partial(recall, samples=test),
        facts={
            "data": "Multi30k (Elliott et al., 2016), English and German captions",
            "training samples": f"{len(train):,} pairs",
            "held-out samples": f"{len(test):,} pairs",
            "vocabulary": f"{len(english):,} English and {len(german):,} German tokens",
        },
    )


def embed(model: nn.Module, micro_batch: Pair) -> tuple[Tensor, Tensor]:
    """The statistic: English and German embeddings (B, width) of some pairs."""
    english, german = model(micro_batch)
    return english, german


def contrast(model: nn.Module, embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of the whole batch: each sentence told apart from all of the other language, in both directions."""
    assert isinstance(model, Matcher)
    return info_nce(*embeddings, temperature=(-model.log_scale).exp(), tile=256)


def recall(model: nn.Module, samples: Sequence[Pair]) -> dict[str, float]:
    """Recall@1: how often a sentence's own translation scores highest of all, the mean of both directions."""
    with evaluating(model):
        embeddings = [model(to_model(pad_columns(part), model)) for part in slices(samples, 500)]
        english, german = (torch.cat(column) for column in zip(*embeddings, strict=True))
        scores = english @ german.T
        own = torch.arange(len(scores), device=scores.device)
        num_right = sum(int((scores.argmax(dim=dim) == own).sum()) for dim in (0, 1))
    return {"recall_at_1": num_right / (2 * len(samples))}
