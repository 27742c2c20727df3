"""The workload `language-model`: a decoder that predicts the next word of paragraphs, or of docstrings.

The workload `encoder`: a small BERT-like Transformer that fills in masked words of docstrings.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gradfold.packing.token_budget import TokenBudget
from gradfold.weights import token_count
from gradfold.workloads.images import evaluating
from gradfold.workloads.text_data import MARK, PAD, Vocabulary, has_one_of, read_docstrings, read_paragraphs
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


DESCRIPTION_of_language_model = "Transformer decoder that predicts the next word; very uneven lengths, mean over tokens"
DATA_of_language_model = "docstrings of Python's standard library, or --data DIR with WikiText-2"

_NUM_DOCSTRINGS = 2200
_HELD_OUT_of_language_model = 11  # one docstring in eleven is held out
_NUM_WORDS_of_language_model = 2000
_MAX_WORDS = 256  # of a text; the rest is left out
_MICRO_BATCH_SIZE = 16
_TRAINING_FILES = ("train.txt", "wiki.train.tokens", "valid.txt", "wiki.valid.tokens")
_TEST_FILES = ("test.txt", "wiki.test.tokens")


class Block(nn.Module):
    """Causal self-attention and a perceptron, each added to its input."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_heads, self.from_heads = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width) -> (B, T, width)
        heads = self.to_heads(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).movedim(1, -2)
        query, key, value = heads.unbind(1)  # (B, heads, T, width / heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.from_heads(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return x


class Decoder(nn.Module):
    """Token and position embeddings, causal layers, a score for each word. A token never sees padding on its right."""

    def __init__(self, num_tokens: int, width: int = 64, num_heads: int = 4, num_layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, width, padding_idx=PAD)
        self.positions = nn.Embedding(_MAX_WORDS, width)
        self.blocks = nn.Sequential(*(Block(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_tokens)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, num_tokens)
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def next_word_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next word, averaged over words; tokens (B, T), each row a mark and then words."""
    logits, labels = model(tokens[:, :-1]), tokens[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD)
    is_word = labels != PAD
    num_correct = ((logits.argmax(dim=2) == labels) & is_word).sum()
    return loss, {"accuracy": num_correct / is_word.sum()}


def pad_of_language_model(samples: Sequence[Tensor]) -> Tensor:
    """The batch of some texts, as long as the longest of them."""
    return pad_sequence(list(samples), batch_first=True, padding_value=PAD)


def lengths(samples: Sequence[Tensor]) -> list[int]:
    """The number of tokens of each text."""
    return [len(sample) for sample in samples]


def held_out_scores_of_language_model(model: nn.Module, samples: Sequence[Tensor]) -> dict[str, float]:
    """Accuracy and loss per word on held-out texts."""
    device = next(model.parameters()).device
    in_order = sorted(samples, key=len)
    num_correct, loss, num_words = 0.0, 0.0, 0
    with evaluating(model):
        for start in range(0, len(in_order), 16):
            tokens = pad_of_language_model(in_order[start : start + 16]).to(device)
            mean_loss, metrics = next_word_loss(model, tokens)
            num = int((tokens[:, 1:] != PAD).sum())
            num_correct += float(metrics["accuracy"]) * num
            loss += float(mean_loss) * num
            num_words += num
    return {"accuracy": num_correct / num_words, "loss": loss / num_words}


def language_model(data: Path | None = None) -> Workload:
    """Next-word prediction on texts of 1 to 256 words: 128 of them to an update, 16 at once, or the tokens of 16.

    The token budget is what 16 texts of the greatest length take, so that no way of cutting needs more memory.

    Args:
        data: the folder with WikiText-2, as text files; where it has no training part, the validation part is trained
            on. None takes the docstrings of this Python's standard library.

    Raises:
        DataError: a file is missing or foreign, or this Python comes without the sources of its standard library.
    """
    if data is None:
        source = f"docstrings of the standard library of Python {platform.python_version()}"
        texts = read_docstrings(_NUM_DOCSTRINGS)
        train_texts = [words for number, words in enumerate(texts) if number % _HELD_OUT_of_language_model]
        test_texts = texts[::_HELD_OUT_of_language_model]
    else:
        part = "training" if has_one_of(data, _TRAINING_FILES[:2]) else "validation"
        source = f"paragraphs of WikiText-2 (Merity et al., 2016), {part} part"
        train_texts, test_texts = read_paragraphs(data, _TRAINING_FILES), read_paragraphs(data, _TEST_FILES)
    vocabulary = Vocabulary.of_most_frequent(train_texts, _NUM_WORDS_of_language_model)
    train, test = (
        [torch.tensor([MARK, *vocabulary.encode(words[:_MAX_WORDS])]) for words in part]
        for part in (train_texts, test_texts)
    )
    longest = max(map(len, train))
    return Workload(
        name="language-model",
        description=DESCRIPTION_of_language_model,
        make_model=partial(Decoder, num_tokens=len(vocabulary)),
        loss_fn=next_word_loss,
        make_optimizer=partial(torch.optim.AdamW, lr=1e-3),
        train_data=train,
        global_batch_size=128,
        micro_batch_size=_MICRO_BATCH_SIZE,
        weight=token_count(_all, ignore_index=PAD, shift=True),
        collate=pad_of_language_model,
        token_budget=TokenBudget(_MICRO_BATCH_SIZE * longest, lengths=lengths),
        evaluate=partial(held_out_scores_of_language_model, samples=test),
        facts={
            "data": source,
            "training samples": f"{len(train):,} of {min(map(len, train)) - 1} to {longest - 1} words",
            "held-out samples": f"{len(test):,}",
            "vocabulary": f"{len(vocabulary):,} tokens",
        },
    )


def _all(tokens: Tensor) -> Tensor:
    return tokens
