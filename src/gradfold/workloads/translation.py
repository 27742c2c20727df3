"""The workload `translation`: an encoder-decoder that translates captions, whose two sentences differ in length."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gradfold.token_budget import TokenBudget
from gradfold.weight import token_count
from gradfold.workloads.evaluation import evaluating
from gradfold.workloads.multi30k import read_pairs
from gradfold.workloads.vocabulary import MARK, PAD, Vocabulary
from gradfold.workloads.workload import Workload

__all__: list[str] = []

DESCRIPTION = "Transformer encoder-decoder, German to English captions of Multi30k; two lengths a row, mean over tokens"
DATA = "--data DIR with train.de.gz, train.en.gz, val.de.gz, val.en.gz"

_NUM_PAIRS = 6000  # of 29,000, so that an epoch takes seconds
_NUM_WORDS = 2000  # of each language
_MAX_WORDS = 64
_MICRO_BATCH_SIZE = 32

# One pair, or with a leading dimension a batch of them: "source" and "target", which begins and ends with a mark.
Sample: TypeAlias = "dict[str, Tensor]"


class Translator(nn.Module):
    """Token and position embeddings, two layers of encoder and decoder, a score for each English word.

    Dropout is off, so that gradients can be compared. Attention to the source leaves its padding out; in the target no
    token sees what comes after it, padding included.
    """

    def __init__(self, num_source: int, num_target: int, width: int = 64, num_heads: int = 4) -> None:
        super().__init__()
        self.source = nn.Embedding(num_source, width, padding_idx=PAD)
        self.target = nn.Embedding(num_target, width, padding_idx=PAD)
        self.positions = nn.Embedding(_MAX_WORDS + 2, width)
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


def translation_loss(model: nn.Module, micro_batch: Sample) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of the next English word, averaged over words and ends of sentences."""
    target = micro_batch["target"]
    logits, labels = model(micro_batch["source"], target[:, :-1]), target[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD)
    is_word = labels != PAD
    num_correct = ((logits.argmax(dim=2) == labels) & is_word).sum()
    return loss, {"accuracy": num_correct / is_word.sum()}


def pad(samples: Sequence[Sample]) -> Sample:
    """The batch of some pairs, each language as long as its longest sentence."""
    return {
        name: pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=PAD)
        for name in ("source", "target")
    }


def lengths(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """The number of tokens of each sentence, by language."""
    return {name: [len(sample[name]) for sample in samples] for name in ("source", "target")}


def held_out_scores(model: nn.Module, samples: Sequence[Sample]) -> dict[str, float]:
    """Accuracy and loss per word on held-out pairs, given the words before it."""
    device = next(model.parameters()).device
    num_correct, loss, num_words = 0.0, 0.0, 0
    with evaluating(model):
        for start in range(0, len(samples), 64):
            batch = {name: tensor.to(device) for name, tensor in pad(samples[start : start + 64]).items()}
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
    sources = Vocabulary.of_most_frequent((source for source, _ in texts), _NUM_WORDS)
    targets = Vocabulary.of_most_frequent((target for _, target in texts), _NUM_WORDS)
    train, test = (
        [
            {
                "source": torch.tensor(sources.encode(source[:_MAX_WORDS])),
                "target": torch.tensor([MARK, *targets.encode(target[:_MAX_WORDS]), MARK]),
            }
            for source, target in part
        ]
        for part in (texts, test_texts)
    )
    longest = sum(max(found) for found in lengths(train).values())
    return Workload(
        name="translation",
        description=DESCRIPTION,
        make_model=partial(Translator, num_source=len(sources), num_target=len(targets)),
        loss_fn=translation_loss,
        make_optimizer=partial(torch.optim.AdamW, lr=1e-3),
        train_data=train,
        global_batch_size=128,
        micro_batch_size=_MICRO_BATCH_SIZE,
        weight=token_count("target", ignore_index=PAD, shift=True),
        collate=pad,
        token_budget=TokenBudget(_MICRO_BATCH_SIZE * longest, lengths=lengths),
        evaluate=partial(held_out_scores, samples=test),
        facts={
            "data": "Multi30k (Elliott et al., 2016), German and English",
            "training samples": f"{len(train):,} pairs of sentences",
            "held-out samples": f"{len(test):,}",
            "vocabulary": f"{len(sources):,} German and {len(targets):,} English tokens",
        },
    )
