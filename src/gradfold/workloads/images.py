"""The workloads on labeled images: `digits`, `mnist`, `cifar10`, and `resnet`, whose BatchNorm couples samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradfold.workloads.image_data import ImageData, load_cifar10, load_digits, load_mnist
from gradfold.workloads.registry import BUILT_IN
from gradfold.workloads.scoring import mean_scores, slices
from gradfold.workloads.workload import Workload

_adam = partial(torch.optim.Adam, lr=1e-3)


def digits() -> Workload:
    """The perceptron of `mnist` on small images; an epoch ends with a partial global batch."""
    model = partial(perceptron, num_pixels=64)
    return _classification("digits", load_digits(), model, _adam, (64, 16), num_epochs=10)


def mnist(data: Path | None = None) -> Workload:
    """Micro-batches of 32 images, 4 to an update; an epoch of 60,000 ends with a partial global batch."""
    model = partial(perceptron, num_pixels=784)
    return _classification("mnist", load_mnist(data), model, _adam, (128, 32), num_epochs=2)


def cifar10(data: Path | None = None) -> Workload:
    """The LeNet of many tutorials: micro-batches of 64 images, 4 to an update."""
    optimizer = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    return _classification("cifar10", load_cifar10(data), LeNet, optimizer, (256, 64), num_epochs=5)


def resnet(data: Path | None = None) -> Workload:
    """BatchNorm by micro-batch statistics, which is not the full batch's gradient; a report shows how far.

    A comparison trains it with GroupNorm too, of which micro-batches give the full batch's gradient. `data` is the
    folder with CIFAR-10; None takes the digits of scikit-learn.
    """
    images = load_digits() if data is None else load_cifar10(data)
    model = partial(ResNet, in_channels=images.train[0].shape[1])
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    normed = _classification("resnet", images, model, optimizer, (64, 16), num_epochs=2)
    facts = {**normed.facts, "BatchNorm": "normalized by the statistics of each micro-batch"}
    return replace(normed, batch_norm="per_micro_batch", facts=facts)


def _classification(
    name: str,
    images: ImageData,
    make_model: Callable[[], nn.Module],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
    batch_sizes: tuple[int, int],
    num_epochs: int,
) -> Workload:
    """Images with their labels, cross-entropy, and scores on the held-out part; a global and a micro-batch size."""
    global_batch_size, micro_batch_size = batch_sizes
    held_out = list(zip(*(slices(tensor, 1000) for tensor in images.test), strict=True))
    return Workload(
        name=name,
        description=BUILT_IN[name].text,
        make_model=make_model,
        loss_fn=classification_loss,
        make_optimizer=make_optimizer,
        train_data=images.train,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        num_epochs=num_epochs,
        evaluate=partial(mean_scores, loss_fn=classification_loss, batches=held_out, count=lambda batch: len(batch[1])),
        facts=images.facts,
    )


def classification_loss(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of (images, labels), with the accuracy as a metric."""
    images, labels = micro_batch
    logits = model(images)
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy}


def perceptron(num_pixels: int) -> nn.Sequential:
    """The layers num_pixels-512-256-128-10 with ReLU between them, over flattened images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise((num_pixels, 512, 256, 128, 10)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class LeNet(nn.Module):
    """Two 5 x 5 convolutions with 2 x 2 max-pooling, then three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 32, 32) -> (B, 10)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (B, 6, 14, 14)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (B, 16, 5, 5)
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits


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

    def forward(self, x: Tensor) -> Tensor:  # (B, in, H, W) -> (B, out, H / stride, W / stride)
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

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 10)
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits
