"""Losses and scores that workloads share: means over held-out batches that are evaluated one after another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import map_tensors

MeanLoss: TypeAlias = Callable[[nn.Module, Any], "Tensor | tuple[Tensor, dict[str, Tensor]]"]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back, since some may be frozen on purpose."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def mean_scores(
    model: nn.Module, loss_fn: MeanLoss, batches: Iterable[Any], count: Callable[[Any], int | Tensor]
) -> dict[str, float]:
    """The metrics and the loss over all batches, on the model's device and in its precision.

    `loss_fn` gives means over a batch, and `count` over how many samples or tokens they go. Batches are small enough to
    need less memory than the training around the evaluation.
    """
    totals: defaultdict[str, float] = defaultdict(float)
    num_all = 0
    with evaluating(model):
        for batch in batches:
            output = loss_fn(model, to_model(batch, model))
            loss, metrics = output if isinstance(output, tuple) else (output, {})
            num = int(count(batch))
            num_all += num
            for name, mean in {**metrics, "loss": loss}.items():
                totals[name] += float(mean) * num
    return {name: total / num_all for name, total in totals.items()}


def slices(samples: Any, size: int) -> list[Any]:
    """A sequence or tensor, `size` rows at a time."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def to_model(batch: Any, model: nn.Module) -> Any:
    """A batch on the model's device, floating point numbers in the model's precision."""
    parameter = next(model.parameters())
    return map_tensors(
        lambda tensor: tensor.to(parameter) if tensor.is_floating_point() else tensor.to(parameter.device), batch
    )


def token_loss(logits: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of logits (B, T, num_tokens), with the accuracy, over the labels (B, T) not to be ignored."""
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignored)
    counts = labels != ignored
    # A product, not logits[counts]: the shape of a selection would have to wait for the device.
    num_correct = ((logits.argmax(dim=2) == labels) & counts).sum()
    return loss, {"accuracy": num_correct / counts.sum()}
