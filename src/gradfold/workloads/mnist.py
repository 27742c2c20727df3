"""The workload `mnist`: a perceptron on MNIST."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from gradfold.workloads.classification import classification_loss, classification_scores
from gradfold.workloads.datasets import load_mnist
from gradfold.workloads.perceptron import perceptron
from gradfold.workloads.workload import Workload

__all__: list[str] = []

DESCRIPTION = "perceptron 784-512-256-128-10 on MNIST, cross-entropy, Adam"
DATA = "downloaded (12 MB), or --data DIR"


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
        description=DESCRIPTION,
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
