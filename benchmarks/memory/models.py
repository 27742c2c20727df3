"""Ten models of the kinds that people train, each with a loss and with data of its shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradfold.workloads.images import LeNet, ResNet

WORDS = 2000


class Case(NamedTuple):
    """A model, its loss, and what makes a batch of some rows."""

    make_model: Callable[[], nn.Module]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    make_batch: Callable[[int], Any]


def classification(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of images."""
    return F.cross_entropy(model(batch[0]), batch[1])


def next_word(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of words."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def reconstruction(model: nn.Module, batch: Any) -> Tensor:
    """Mean square of the difference."""
    return F.mse_loss(model(batch), batch)


class Transformer(nn.Module):
    """Embedding, layers with dropout, a score for each word."""

    def __init__(self, *, causal: bool = False, tied: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 128)
        layers = [nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True) for _ in range(4)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(128, WORDS, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.causal, self.checkpointed = causal, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T, WORDS)."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if self.causal else None
        x = self.embedding(x)
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=False) if self.checkpointed else layer(x, src_mask=mask)
        scores: Tensor = self.head(x)
        return scores


class UShape(nn.Module):
    """Down, up, and a connection across."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.SiLU())
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.last = nn.Conv2d(2 * channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3, H, W)."""
        x = self.first(x)
        image: Tensor = self.last(torch.cat([x, self.up(F.silu(self.down(x)))], 1))
        return image


class Recurrent(nn.Module):
    """Embedding, LSTM, a score for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(WORDS, 128), nn.LSTM(128, 192, 2, batch_first=True)
        self.head = nn.Linear(192, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T, WORDS)."""
        scores: Tensor = self.head(self.lstm(self.embedding(x))[0])
        return scores


def perceptron() -> nn.Module:
    """784-1024-512-10, on images of 28 x 28."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10))


def with_frozen_parts() -> nn.Module:
    """A ResNet whose first layers are frozen."""
    model = ResNet(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("conv", "bn", "blocks.0")))
    return model


def _images(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 3, 32, 32), torch.randint(0, 10, (rows,))


def _digits(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 784), torch.randint(0, 10, (rows,))


def _words(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, WORDS, (rows, 64)), torch.randint(0, WORDS, (rows, 64))


CASES = {
    "perceptron": Case(perceptron, classification, _digits),
    "LeNet": Case(LeNet, classification, _images),
    "ResNet": Case(partial(ResNet, 3), classification, _images),
    "encoder": Case(Transformer, next_word, _words),
    "decoder LM": Case(partial(Transformer, causal=True), next_word, _words),
    "U-Net shape": Case(UShape, reconstruction, lambda rows: _images(rows)[0]),
    "shared embeddings": Case(partial(Transformer, tied=True), next_word, _words),
    "checkpointing": Case(partial(Transformer, checkpointed=True), next_word, _words),
    "frozen parts": Case(with_frozen_parts, classification, _images),
    "LSTM": Case(Recurrent, next_word, _words),
}
OPTIMIZERS = {
    "SGD momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=1e-3),
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
}
