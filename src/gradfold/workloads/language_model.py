"""The workload `language-model`: a decoder that predicts the next word of paragraphs, or of docstrings."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gradfold.token_budget import TokenBudget
from gradfold.weight import token_count
from gradfold.workloads.docstrings import read_docstrings
from gradfold.workloads.evaluation import evaluating
from gradfold.workloads.text_files import has_one_of
from gradfold.workloads.vocabulary import MARK, PAD, Vocabulary
from gradfold.workloads.wikitext import read_paragraphs
from gradfold.workloads.workload import Workload

__all__: list[str] = []

DESCRIPTION = "Transformer decoder that predicts the next word; very uneven lengths, mean over tokens"
DATA = "docstrings of Python's standard library, or --data DIR with WikiText-2"

_NUM_DOCSTRINGS = 2200
_HELD_OUT = 11  # one docstring in eleven is held out
_NUM_WORDS = 2000
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


def pad(samples: Sequence[Tensor]) -> Tensor:
    """The batch of some texts, as long as the longest of them."""
    return pad_sequence(list(samples), batch_first=True, padding_value=PAD)


def lengths(samples: Sequence[Tensor]) -> list[int]:
    """The number of tokens of each text."""
    return [len(sample) for sample in samples]


def held_out_scores(model: nn.Module, samples: Sequence[Tensor]) -> dict[str, float]:
    """Accuracy and loss per word on held-out texts."""
    device = next(model.parameters()).device
    in_order = sorted(samples, key=len)
    num_correct, loss, num_words = 0.0, 0.0, 0
    with evaluating(model):
        for start in range(0, len(in_order), 16):
            tokens = pad(in_order[start : start + 16]).to(device)
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
        train_texts = [words for number, words in enumerate(texts) if number % _HELD_OUT]
        test_texts = texts[::_HELD_OUT]
    else:
        part = "training" if has_one_of(data, _TRAINING_FILES[:2]) else "validation"
        source = f"paragraphs of WikiText-2 (Merity et al., 2016), {part} part"
        train_texts, test_texts = read_paragraphs(data, _TRAINING_FILES), read_paragraphs(data, _TEST_FILES)
    vocabulary = Vocabulary.of_most_frequent(train_texts, _NUM_WORDS)
    train, test = (
        [torch.tensor([MARK, *vocabulary.encode(words[:_MAX_WORDS])]) for words in part]
        for part in (train_texts, test_texts)
    )
    longest = max(map(len, train))
    return Workload(
        name="language-model",
        description=DESCRIPTION,
        make_model=partial(Decoder, num_tokens=len(vocabulary)),
        loss_fn=next_word_loss,
        make_optimizer=partial(torch.optim.AdamW, lr=1e-3),
        train_data=train,
        global_batch_size=128,
        micro_batch_size=_MICRO_BATCH_SIZE,
        weight=token_count(_all, ignore_index=PAD, shift=True),
        collate=pad,
        token_budget=TokenBudget(_MICRO_BATCH_SIZE * longest, lengths=lengths),
        evaluate=partial(held_out_scores, samples=test),
        facts={
            "data": source,
            "training samples": f"{len(train):,} of {min(map(len, train)) - 1} to {longest - 1} words",
            "held-out samples": f"{len(test):,}",
            "vocabulary": f"{len(vocabulary):,} tokens",
        },
    )


def _all(tokens: Tensor) -> Tensor:
    return tokens
