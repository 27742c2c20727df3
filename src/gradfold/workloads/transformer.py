"""The Transformers of the text workloads: encoder, decoder, encoder-decoder and sentence encoder.

Dropout is off: each micro-batch would draw its own masks, and an accumulated gradient could not be compared with the
full batch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradfold.workloads.text_data import PAD

_WIDTH, _NUM_HEADS = 64, 4
_OPTIONS: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": True}
_LAYER: dict[str, Any] = {"nhead": _NUM_HEADS, "dim_feedforward": 4 * _WIDTH, "activation": "gelu", **_OPTIONS}


class Encoder(nn.Module):
    """Two layers that see the whole text but for its padding, and a score for each word of the vocabulary."""

    def __init__(self, num_tokens: int, max_tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, _WIDTH, padding_idx=PAD)
        self.positions = nn.Embedding(max_tokens, _WIDTH)
        self.layers = _encoder_layers()
        self.head = nn.Linear(_WIDTH, num_tokens)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, num_tokens)
        x = _embed(tokens, self.tokens, self.positions)
        logits: Tensor = self.head(self.layers(x, src_key_padding_mask=tokens == PAD))
        return logits


class Decoder(nn.Module):
    """Two causal layers, and a score for each word. A token never sees what comes after it, padding included."""

    def __init__(self, num_tokens: int, max_tokens: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(num_tokens, _WIDTH, padding_idx=PAD)
        self.positions = nn.Embedding(max_tokens, _WIDTH)
        self.blocks = nn.Sequential(CausalBlock(), CausalBlock())
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, num_tokens)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, num_tokens)
        x = _embed(tokens, self.tokens, self.positions)
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class CausalBlock(nn.Module):
    """Causal self-attention and a perceptron, each added to its input.

    By `scaled_dot_product_attention(is_causal=True)`, which needs no mask in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.to_heads, self.from_heads = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, width) -> (B, T, width)
        heads = self.to_heads(self.norm1(x)).unflatten(-1, (3, _NUM_HEADS, -1)).movedim(1, -2)
        query, key, value = heads.unbind(1)  # (B, heads, T, width / heads)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.from_heads(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return x


class EncoderDecoder(nn.Module):
    """Two layers of encoder and of decoder, and a score for each word of the target.

    Attention to the source leaves its padding out; in the target no token sees what comes after it, padding included.
    """

    def __init__(self, num_source: int, num_target: int, max_tokens: int) -> None:
        super().__init__()
        self.source = nn.Embedding(num_source, _WIDTH, padding_idx=PAD)
        self.target = nn.Embedding(num_target, _WIDTH, padding_idx=PAD)
        self.positions = nn.Embedding(max_tokens, _WIDTH)
        self.encoder = _encoder_layers()
        layer = nn.TransformerDecoderLayer(_WIDTH, **_LAYER)
        self.decoder = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(_WIDTH))
        self.head = nn.Linear(_WIDTH, num_target)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:  # (B, S), (B, T) -> (B, T, num_target)
        is_padding = source == PAD
        is_future = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool, device=target.device).triu(1)
        memory = self.encoder(_embed(source, self.source, self.positions), src_key_padding_mask=is_padding)
        x = _embed(target, self.target, self.positions)
        x = self.decoder(x, memory, tgt_mask=is_future, memory_key_padding_mask=is_padding)
        logits: Tensor = self.head(x)
        return logits


class SentenceEncoder(nn.Module):
    """One layer, and the mean over the words as a unit vector."""

    def __init__(self, num_tokens: int, max_tokens: int) -> None:
        super().__init__()
        self.words = nn.Embedding(num_tokens, _WIDTH, padding_idx=PAD)
        self.positions = nn.Embedding(max_tokens, _WIDTH)
        self.layer = nn.TransformerEncoderLayer(_WIDTH, nhead=2, dim_feedforward=2 * _WIDTH, **_OPTIONS)
        self.head = nn.Linear(_WIDTH, _WIDTH)
        for embedding in (self.words, self.positions):
            nn.init.normal_(embedding.weight, std=0.05)

    def forward(self, words: Tensor) -> Tensor:  # (B, T) -> (B, width)
        is_padding = words == PAD
        x = self.layer(_embed(words, self.words, self.positions), src_key_padding_mask=is_padding)
        x = x.masked_fill(is_padding[:, :, None], 0).sum(dim=1) / (~is_padding).sum(dim=1, keepdim=True)
        return F.normalize(self.head(x), dim=1)


def _embed(tokens: Tensor, words: nn.Embedding, positions: nn.Embedding) -> Tensor:  # (B, T) -> (B, T, width)
    embedded: Tensor = words(tokens)
    return embedded + positions.weight[: tokens.shape[1]]


def _encoder_layers() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(_WIDTH, **_LAYER)
    return nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(_WIDTH), enable_nested_tensor=False)
