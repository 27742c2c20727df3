"""The workload `resnet`: a small residual network with BatchNorm, whose samples see each other.

An evaluation: a model looked at with its training switched off, and left as it was found.

Classification: the loss of a batch of labeled images, and a model's scores on held-out ones.

The workload `cifar10`: a small convolutional network, the LeNet of many tutorials, on CIFAR-10.

A perceptron: four linear layers with ReLU between them, for images of any size.

The workload `digits`: a perceptron on the 8 x 8 digits that scikit-learn brings along; the default.

The workload `mnist`: a perceptron on MNIST.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from gradfold.workloads.image_data import load_cifar10, load_digits, load_mnist
from gradfold.workloads.workload import Workload

__all__: list[str] = []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back, for some may be frozen on purpose."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


# A held-out set is scored in slices, so that an evaluation needs less memory than the training around it.
_SLICE_ROWS = 1000


def classification_loss(
    model: nn.Module, micro_batch: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean cross-entropy of (images, labels), with the accuracy as a metric."""
    images, labels = micro_batch
    logits = model(images)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy}


def classification_scores(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracy and mean cross-entropy on held-out images, on the model's device and in its precision."""
    parameter = next(model.parameters())
    num_correct, loss = 0, 0.0
    with evaluating(model):
        for start in range(0, len(images), _SLICE_ROWS):
            rows = slice(start, start + _SLICE_ROWS)
            logits = model(images[rows].to(parameter))
            expected = labels[rows].to(parameter.device)
            num_correct += int((logits.argmax(dim=1) == expected).sum())
            loss += float(F.cross_entropy(logits, expected, reduction="sum"))
    return {"accuracy": num_correct / len(images), "loss": loss / len(images)}


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


DESCRIPTION_of_digits = "perceptron 64-512-256-128-10 on the 8 x 8 digits of scikit-learn, cross-entropy, Adam"
DATA_of_digits = "embedded in scikit-learn"


def digits() -> Workload:
    """The perceptron of `mnist` on small images; an epoch ends with a partial global batch.

    Raises:
        WorkloadError: scikit-learn is not installed.
    """
    images = load_digits()
    return Workload(
        name="digits",
        description=DESCRIPTION_of_digits,
        make_model=partial(perceptron, num_pixels=64),
        loss_fn=classification_loss,
        make_optimizer=partial(torch.optim.Adam, lr=1e-3),
        train_data=(images.train_images, images.train_labels),
        global_batch_size=64,
        micro_batch_size=16,
        num_epochs=10,
        evaluate=partial(classification_scores, images=images.test_images, labels=images.test_labels),
        facts=images.facts,
    )


DESCRIPTION_of_mnist = "perceptron 784-512-256-128-10 on MNIST, cross-entropy, Adam"
DATA_of_mnist = "downloaded (12 MB), or --data DIR"


def mnist(data: Path | None = None) -> Workload:
    """Micro-batches of 32 images, 4 to an update; an epoch of 60,000 ends with a partial global batch.

    Args:
        data: the folder with the four IDX files; None downloads them (12 MB).

    Raises:
        DataError: a file is missing, damaged or foreign, or cannot be downloaded.
    """
    images = load_mnist(data)
    return Workload(
        name="mnist",
        description=DESCRIPTION_of_mnist,
        make_model=partial(perceptron, num_pixels=784),
        loss_fn=classification_loss,
        make_optimizer=partial(torch.optim.Adam, lr=1e-3),
        train_data=(images.train_images, images.train_labels),
        global_batch_size=128,
        micro_batch_size=32,
        num_epochs=2,
        evaluate=partial(classification_scores, images=images.test_images, labels=images.test_labels),
        facts=images.facts,
    )


DESCRIPTION_of_resnet = (
    "small ResNet with BatchNorm (normalized per micro-batch) on CIFAR-10, or on digits without data"
)
DATA_of_resnet = "embedded in scikit-learn, or --data DIR"


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
        description=DESCRIPTION_of_resnet,
        make_model=partial(ResNet, in_channels=images.train_images.shape[1]),
        loss_fn=classification_loss,
        make_optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        train_data=(images.train_images, images.train_labels),
        global_batch_size=64,
        micro_batch_size=16,
        num_epochs=2,
        batch_norm="per_micro_batch",
        evaluate=partial(classification_scores, images=images.test_images, labels=images.test_labels),
        facts={**images.facts, "BatchNorm": "normalized by the statistics of each micro-batch"},
    )
