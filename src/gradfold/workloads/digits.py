"""The workload `digits`: a perceptron on the 8 x 8 digits that scikit-learn brings along; the default."""

from __future__ import annotations

from functools import partial

import torch

from gradfold.workloads.classification import classification_loss, classification_scores
from gradfold.workloads.datasets import load_digits
from gradfold.workloads.perceptron import perceptron
from gradfold.workloads.workload import Workload

__all__: list[str] = []

DESCRIPTION = "perceptron 64-512-256-128-10 on the 8 x 8 digits of scikit-learn, cross-entropy, Adam"
DATA = "embedded in scikit-learn"


def digits() -> Workload:
    """The perceptron of `mnist` on small images; an epoch ends with a partial global batch.

    Raises:
        WorkloadError: scikit-learn is not installed.
    """
    images = load_digits()
    return Workload(
        name="digits",
        description=DESCRIPTION,
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
