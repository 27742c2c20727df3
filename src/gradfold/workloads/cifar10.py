"""The workload `cifar10`: a small convolutional network, the LeNet of many tutorials, on CIFAR-10."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gradfold.workloads.classification import classification_loss, classification_scores
from gradfold.workloads.datasets import load_cifar10
from gradfold.workloads.workload import Workload

__all__: list[str] = []

DESCRIPTION = "LeNet (convolutions of 6 and 16 channels, linear 120-84-10) on CIFAR-10, cross-entropy, SGD"
DATA = "downloaded (170 MB), or --data DIR"


class LeNet(nn.Module):
    """Two 5 x 5 convolutions with 2 x 2 max-pooling, then three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 3, 32, 32) -> (B, 10)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (B, 6, 14, 14)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 5, 5)
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        logits: torch.Tensor = self.fc3(x)
        return logits


def cifar10(data: Path | None = None) -> Workload:
    """Micro-batches of 64 images, 4 to an update.

    Args:
        data: the folder with the binary version of CIFAR-10; None downloads it (170 MB).

    Raises:
        DataError: a file is missing, damaged or foreign, or cannot be downloaded.
    """
    images = load_cifar10(data)
    return Workload(
        name="cifar10",
        description=DESCRIPTION,
        make_model=LeNet,
        loss_fn=classification_loss,
        make_optimizer=partial(torch.optim.SGD, lr=1e-3, momentum=0.9),
        train_data=(images.train_images, images.train_labels),
        global_batch_size=256,
        micro_batch_size=64,
        num_epochs=5,
        evaluate=partial(classification_scores, images=images.test_images, labels=images.test_labels),
        facts=images.facts,
    )
