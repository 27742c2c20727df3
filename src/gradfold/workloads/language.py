"""The workloads on one language: `encoder` fills in masked words, `language-model` predicts the next word."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gradfold.packing.token_budget import TokenBudget
from gradfold.weights import token_count
from gradfold.workloads import text_data
from gradfold.workloads.registry import BUILT_IN
from gradfold.workloads.scoring import mean_scores, slices, token_loss
from gradfold.workloads.text_data import DOCSTRINGS, MARK, PAD, Vocabulary, pad, pad_columns
from gradfold.workloads.transformer import Decoder, Encoder
from gradfold.workloads.workload import Workload

Texts: TypeAlias = "list[list[str]]"

_NUM_DOCSTRINGS = 2200
_HELD_OUT = 11  # one docstring in eleven is held out

# `encoder`: a sample has "tokens" with the masks in place, and "labels"; a batch has them with a leading dimension.
MaskedText: TypeAlias = "dict[str, Tensor]"
_ENCODER_WORDS = 1000
_ENCODER_MAX_TOKENS = 64
_MASKED_SHARE = 0.15
_UNMASKED = -100  # the label of every token that is not masked
collate_masked = partial(pad_columns, labels=_UNMASKED)

# `language-model`: a sample is a mark and then the words of a text.
_MODEL_WORDS = 2000
_MODEL_MAX_WORDS = 256  # of a text; the rest is left out
_MODEL_ROWS = 16  # of a micro-batch
_TRAINING_FILES = ("train.txt", "wiki.train.tokens")
_VALIDATION_FILES = ("valid.txt", "wiki.valid.tokens")
_TEST_FILES = ("test.txt", "wiki.test.tokens")


def encoder() -> Workload:
    """Masked word prediction on samples of 1 to 64 tokens: micro-batches of 2 samples, 4 to an update.

    The loss is a mean over masked tokens, and micro-batches differ in their number: the weight is the count of the
    labels. The masks are drawn once, with the data, so they are the same for every method that is compared.
    """
    texts, test_texts = _docstrings(_ENCODER_MAX_TOKENS)
    vocabulary = Vocabulary.of_most_frequent(texts, _ENCODER_WORDS)
    generator = torch.Generator().manual_seed(0)
    train, test = (
        [mask(torch.tensor(vocabulary.encode(words)), generator) for words in part] for part in (texts, test_texts)
    )
    weight = token_count("labels")
    held_out = list(map(collate_masked, slices(test, 50)))
    return Workload(
        name="encoder",
        description=BUILT_IN["encoder"].text,
        make_model=partial(Encoder, num_tokens=len(vocabulary), max_tokens=_ENCODER_MAX_TOKENS),
        loss_fn=masked_token_loss,
        make_optimizer=partial(torch.optim.AdamW, lr=1e-3),
        train_data=train,
        global_batch_size=8,
        micro_batch_size=2,
        weight=weight,
        collate=collate_masked,
        evaluate=partial(mean_scores, loss_fn=masked_token_loss, batches=held_out, count=weight),
        facts={
            "data": DOCSTRINGS,
            "training samples": f"{len(train):,} of up to {_ENCODER_MAX_TOKENS} tokens",
            "held-out samples": f"{len(test):,}",
            "vocabulary": f"{len(vocabulary):,} tokens",
        },
    )


def mask(tokens: Tensor, generator: torch.Generator) -> MaskedText:
    """A sample with 15 % of its tokens masked, at least one: no micro-batch has an empty mean."""
    num_masked = max(1, round(_MASKED_SHARE * len(tokens)))
    chosen = torch.randperm(len(tokens), generator=generator)[:num_masked]
    labels = torch.full_like(tokens, _UNMASKED)
    labels[chosen] = tokens[chosen]
    return {"tokens": tokens.index_fill(0, chosen, MARK), "labels": labels}


def masked_token_loss(model: nn.Module, micro_batch: MaskedText) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy averaged over the masked tokens, with the accuracy on them as a metric."""
    return token_loss(model(micro_batch["tokens"]), micro_batch["labels"], ignored=_UNMASKED)


def language_model(data: Path | None = None) -> Workload:
    """Next-word prediction on texts of 1 to 256 words: 128 of them to an update, 16 at once, or the tokens of 16.

    The token budget is what 16 texts of the greatest length take: no way of splitting needs more memory. `data` is the
    folder with WikiText-2; where it has no training part, the validation part is trained on. None takes docstrings.
    """
    source, (texts, test_texts) = (DOCSTRINGS, _docstrings()) if data is None else _wikitext(data)
    vocabulary = Vocabulary.of_most_frequent(texts, _MODEL_WORDS)
    train, test = (
        [torch.tensor([MARK, *vocabulary.encode(words[:_MODEL_MAX_WORDS])]) for words in part]
        for part in (texts, test_texts)
    )
    lengths = text_data.lengths(train)
    weight = token_count(_all, ignore_index=PAD, shift=True)
    held_out = list(map(pad, slices(sorted(test, key=len), 16)))
    return Workload(
        name="language-model",
        description=BUILT_IN["language-model"].text,
        make_model=partial(Decoder, num_tokens=len(vocabulary), max_tokens=_MODEL_MAX_WORDS),
        loss_fn=next_word_loss,
        make_optimizer=partial(torch.optim.AdamW, lr=1e-3),
        train_data=train,
        global_batch_size=128,
        micro_batch_size=_MODEL_ROWS,
        weight=weight,
        collate=pad,
        token_budget=TokenBudget(_MODEL_ROWS * max(lengths), lengths=text_data.lengths),
        evaluate=partial(mean_scores, loss_fn=next_word_loss, batches=held_out, count=weight),
        facts={
            "data": source,
            "training samples": f"{len(train):,} of {min(lengths) - 1} to {max(lengths) - 1} words",
            "held-out samples": f"{len(test):,}",
            "vocabulary": f"{len(vocabulary):,} tokens",
        },
    )


def next_word_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next word, averaged over words; tokens (B, T), each row a mark and then words."""
    return token_loss(model(tokens[:, :-1]), tokens[:, 1:], ignored=PAD)


def _docstrings(max_words: int | None = None) -> tuple[Texts, Texts]:
    """The texts to train on and those held out."""
    texts = [words[:max_words] for words in text_data.read_docstrings(_NUM_DOCSTRINGS)]
    return [words for number, words in enumerate(texts) if number % _HELD_OUT], texts[::_HELD_OUT]


def _wikitext(folder: Path) -> tuple[str, tuple[Texts, Texts]]:
    has_training_part = any((folder / name).is_file() for name in _TRAINING_FILES)
    source = f"paragraphs of WikiText-2 (Merity et al., 2016), {'training' if has_training_part else 'validation'} part"
    train = text_data.read_paragraphs(folder, (*_TRAINING_FILES, *_VALIDATION_FILES))
    return source, (train, text_data.read_paragraphs(folder, _TEST_FILES))


def _all(tokens: Tensor) -> Tensor:
    return tokens
