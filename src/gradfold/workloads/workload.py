"""A workload: model, loss, data, optimizer and evaluation in one value, which is what the commands run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gradfold.batch.split import Collate
from gradfold.batchnorm.per_micro_batch import BatchNormOption
from gradfold.engine.loss_terms import LossFn
from gradfold.packing.token_budget import TokenBudget
from gradfold.weights import WeightOption

__all__ = ["Workload"]


@dataclass(frozen=True)
class Workload:
    """Everything that a command needs in order to train, measure and judge one model.

    Args:
        name: short name, as on the command line.
        description: one line for `gradfold workloads`.
        make_model: builds the model in training mode; torch's seed is set by the caller, so that every call after
            the same seed builds the same weights.
        loss_fn: `(model, micro_batch) -> loss` or `-> (loss, metrics)`, as for `Accumulator`; `loss` is a mean.
        make_optimizer: builds the optimizer for the model's parameters.
        train_data: training samples: a nesting of tensors that agree in dim 0, or, with `collate`, a sequence of
            samples.
        global_batch_size: rows of one update, by default.
        micro_batch_size: rows that are run at once, by default.
        num_epochs: passes over the training samples, by default.
        shuffle: whether an epoch visits the samples in a random order (drawn by the caller) or as they stand.
        weight: as for `Accumulator`.
        collate: as for `Accumulator`.
        batch_norm: as for `Accumulator`.
        token_budget: what runs at once where rows are put together by length, for the same memory as
            `micro_batch_size`; a comparison adds an arm for it, and follows the ratio of the two.
        evaluate: `model -> {"accuracy": 0.97, ...}` on held-out data; it may be slow and must leave the model in
            the mode in which it found it.
        facts: what a reader of a report should know about the data (source, number of samples, ...).
    """

    name: str
    description: str
    make_model: Callable[[], nn.Module]
    loss_fn: LossFn
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    train_data: Any
    global_batch_size: int
    micro_batch_size: int
    num_epochs: int = 1
    shuffle: bool = True
    weight: WeightOption = "samples"
    collate: Collate | None = None
    batch_norm: BatchNormOption = None
    token_budget: TokenBudget | None = None
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
