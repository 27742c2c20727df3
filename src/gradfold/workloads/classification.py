"""Classification: the loss of a batch of labelled images, and a model's scores on held-out ones."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gradfold.workloads.evaluation import evaluating

__all__: list[str] = []

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
