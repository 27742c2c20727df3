"""A network of the shape of ResNet-18, narrow: 20 BatchNorm layers. Imports torch alone."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two convolutions with BatchNorm and a shortcut, as in ResNet-18."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(out + self.shortcut(x), inplace=True)


def resnet18(width=4):
    """Its shape: a stem and four pairs of blocks, 20 BatchNorm layers; narrow."""
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    blocks = [
        Block(before if first else after, after, 2 if first and at else 1)
        for at, (before, after) in enumerate(pairwise(widths))
        for first in (True, False)
    ]
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10))


def classify(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])
