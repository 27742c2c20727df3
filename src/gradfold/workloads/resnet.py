"""The workload `resnet`: a small residual network with BatchNorm, whose samples see each other."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gradfold.workloads.classification import classification_loss, classification_scores
from gradfold.workloads.datasets import load_cifar10, load_digits
from gradfold.workloads.workload import Workload

__all__: list[str] = []

DESCRIPTION = "small ResNet with BatchNorm (normalised per micro-batch) on CIFAR-10, or on digits without data"
DATA = "embedded in scikit-learn, or --data DIR"


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, added to a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, in, H, W) -> (B, out, H / stride, W / stride)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """A convolution, three residual blocks of 16, 32 and 64 channels, global average pooling, a linear layer."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            ResidualBlock(16, 16, stride=1), ResidualBlock(16, 32, stride=2), ResidualBlock(32, 64, stride=2)
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, 10)
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: torch.Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def resnet(data: Path | None = None) -> Workload:
    """BatchNorm by micro-batch statistics, which is not the full batch's gradient; a report shows how far.

    A comparison trains it with GroupNorm too, of which micro-batches give the full batch's gradient.

    Args:
        data: the folder with the binary version of CIFAR-10; None takes the digits of scikit-learn.

    Raises:
        DataError: a file is missing, damaged or foreign.
        WorkloadError: scikit-learn is not installed.
    """
    images = load_digits() if data is None else load_cifar10(data)
    return Workload(
        name="resnet",
        description=DESCRIPTION,
        make_model=partial(ResNet, in_channels=images.train_images.shape[1]),
        loss_fn=classification_loss,
        make_optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        train_data=(images.train_images, images.train_labels),
        global_batch_size=64,
        micro_batch_size=16,
        num_epochs=2,
        batch_norm="per_micro_batch",
        evaluate=partial(classification_scores, images=images.test_images, labels=images.test_labels),
        facts={**images.facts, "BatchNorm": "normalised by the statistics of each micro-batch"},
    )
