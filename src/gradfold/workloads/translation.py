"""The workload `translation`: an encoder-decoder that translates captions, whose two sentences differ in length.

The workload `matching`: two encoders that tell which German sentence says what an English one says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gradfold.losses import info_nce
from gradfold.packing.token_budget import TokenBudget
from gradfold.twophase.loss import TwoPhaseLoss
from gradfold.weights import token_count
from gradfold.workloads.images import evaluating
from gradfold.workloads.text_data import MARK, PAD, Vocabulary, read_pairs, words_of
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


DESCRIPTION_of_translation = (
    "Transformer encoder-decoder, German to English captions of Multi30k; two lengths a row, mean over tokens"
)
DATA_of_translation = "--data DIR with train.de.gz, train.en.gz, val.de.gz, val.en.gz"

_NUM_PAIRS = 6000  # of 29,000, so that an epoch takes seconds
_NUM_WORDS_of_translation = 2000  # of each language
_MAX_WORDS_of_translation = 64
_MICRO_BATCH_SIZE = 32

# One pair, or with a leading dimension a batch of them: "source" and "target", which begins and ends with a mark.
Sample_of_translation: TypeAlias = "dict[str, Tensor]"


class Translator(nn.Module):
    """Token and position embeddings, two layers of encoder and decoder, a score for each English word.

    Dropout is off, so that gradients can be compared. Attention to the source leaves its padding out; in the target no
    token sees what comes after it, padding included.
    """

    def __init__(self, num_source: int, num_target: int, width: int = 64, num_heads: int = 4) -> None:
        super().__init__()
        self.source = nn.Embedding(num_source, width, padding_idx=PAD)
        self.target = nn.Embedding(num_target, width, padding_idx=PAD)
        self.positions = nn.Embedding(_MAX_WORDS_of_translation + 2, width)
        shape: dict[str, Any] = {"dim_feedforward": 4 * width, "activation": "gelu"}
        shape |= {"dropout": 0.0, "batch_first": True, "norm_first": True}
        encoder_layer = nn.TransformerEncoderLayer(width, num_heads, **shape)
        decoder_layer = nn.TransformerDecoderLayer(width, num_heads, **shape)
        self.encoder = nn.TransformerEncoder(encoder_layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder_layer, 2, norm=nn.LayerNorm(width))
        self.head = nn.Linear(width, num_target)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:  # (B, S), (B, T) -> (B, T, num_target)
        is_padding = source == PAD
        is_future = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool, device=target.device).triu(1)
        read = self.source(source) + self.positions.weight[: source.shape[1]]
        memory = self.encoder(read, src_key_padding_mask=is_padding)
        written = self.target(target) + self.positions.weight[: target.shape[1]]
        hidden = self.decoder(written, memory, tgt_mask=is_future, memory_key_padding_mask=is_padding)
        logits: Tensor = self.head(hidden)
        return logits


def translation_loss(model: nn.Module, micro_batch: Sample_of_translation) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next English word, averaged over words and ends of sentences."""
    target = micro_batch["target"]
    logits, labels = model(micro_batch["source"], target[:, :-1]), target[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD)
    is_word = labels != PAD
    num_correct = ((logits.argmax(dim=2) == labels) & is_word).sum()
    return loss, {"accuracy": num_correct / is_word.sum()}


def pad_of_translation(samples: Sequence[Sample_of_translation]) -> Sample_of_translation:
    """The batch of some pairs, each language as long as its longest sentence."""
    return {
        name: pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=PAD)
        for name in ("source", "target")
    }


def lengths(samples: Sequence[Sample_of_translation]) -> dict[str, list[int]]:
    """The number of tokens of each sentence, by language."""
    return {name: [len(sample[name]) for sample in samples] for name in ("source", "target")}


def held_out_scores(model: nn.Module, samples: Sequence[Sample_of_translation]) -> dict[str, float]:
    """Accuracy and loss per word on held-out pairs, given the words before it."""
    device = next(model.parameters()).device
    num_correct, loss, num_words = 0.0, 0.0, 0
    with evaluating(model):
        for start in range(0, len(samples), 64):
            batch = {
                name: tensor.to(device) for name, tensor in pad_of_translation(samples[start : start + 64]).items()
            }
            mean_loss, metrics = translation_loss(model, batch)
            num = int((batch["target"][:, 1:] != PAD).sum())
            num_correct += float(metrics["accuracy"]) * num
            loss += float(mean_loss) * num
            num_words += num
    return {"accuracy": num_correct / num_words, "loss": loss / num_words}


def translation(data: Path | None = None) -> Workload:
    """Translation at word level: 128 pairs to an update, 32 at once, or the tokens of 32.

    Args:
        data: the folder with Multi30k, gzipped or not. The first 6,000 training pairs are used.

    Raises:
        DataError: no folder is given, or a file is missing or damaged.
    """
    texts, test_texts = (
        [(source.split(), target.split()) for source, target in read_pairs(data, part, ("de", "en"))[:_NUM_PAIRS]]
        for part in ("train", "val")
    )
    sources = Vocabulary.of_most_frequent((source for source, _ in texts), _NUM_WORDS_of_translation)
    targets = Vocabulary.of_most_frequent((target for _, target in texts), _NUM_WORDS_of_translation)
    train, test = (
        [
            {
                "source": torch.tensor(sources.encode(source[:_MAX_WORDS_of_translation])),
                "target": torch.tensor([MARK, *targets.encode(target[:_MAX_WORDS_of_translation]), MARK]),
            }
            for source, target in part
        ]
        for part in (texts, test_texts)
    )
    longest = sum(max(found) for found in lengths(train).values())
    return Workload(
        name="translation",
        description=DESCRIPTION_of_translation,
        make_model=partial(Translator, num_source=len(sources), num_target=len(targets)),
        loss_fn=translation_loss,
        make_optimizer=partial(torch.optim.AdamW, lr=1e-3),
        train_data=train,
        global_batch_size=128,
        micro_batch_size=_MICRO_BATCH_SIZE,
        weight=token_count("target", ignore_index=PAD, shift=True),
        collate=pad_of_translation,
        token_budget=TokenBudget(_MICRO_BATCH_SIZE * longest, lengths=lengths),
        evaluate=partial(held_out_scores, samples=test),
        facts={
            "data": "Multi30k (Elliott et al., 2016), German and English",
            "training samples": f"{len(train):,} pairs of sentences",
            "held-out samples": f"{len(test):,}",
            "vocabulary": f"{len(sources):,} German and {len(targets):,} English tokens",
        },
    )
