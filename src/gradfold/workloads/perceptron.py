"""A perceptron: four linear layers with ReLU between them, for images of any size."""

from __future__ import annotations

from torch import nn

__all__: list[str] = []


def perceptron(num_pixels: int, num_classes: int = 10) -> nn.Sequential:
    """The layers num_pixels-512-256-128-num_classes, over flattened images."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(num_pixels, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )
