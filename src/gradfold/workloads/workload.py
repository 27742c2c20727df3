"""A workload: model, loss, data, optimizer and evaluation in one value, which is what the commands run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gradfold.accumulator import Accumulator
from gradfold.batch.split import Collate
from gradfold.batchnorm.policy import BatchNormOption
from gradfold.engine.loss_terms import LossFn
from gradfold.packing.token_budget import TokenBudget
from gradfold.weights import WeightOption


@dataclass(frozen=True)
class Workload:
    """Everything that a command needs in order to train, measure and judge one model.

    Args:
        name: short name, as on the command line.
        description: one line for `gradfold workloads`.
        make_model: builds the model in training mode. The caller sets torch's seed: every call after the same seed
            builds the same weights.
        loss_fn: `(model, micro_batch) -> loss` or `-> (loss, metrics)`, as for `Accumulator`; `loss` is a mean.
        make_optimizer: builds the optimizer for the model's parameters.
        train_data: a nesting of tensors that agree in dim 0, or, with `collate`, a sequence of samples.
        global_batch_size: samples of one update, by default.
        micro_batch_size: samples that are run at once, by default.
        num_epochs: passes over the training samples, by default.
        shuffle: whether an epoch visits the samples in a random order (drawn by the caller) or as they stand.
        weight, collate, batch_norm: as for `Accumulator`.
        token_budget: what runs at once where samples are batched by length, for the same memory as
            `micro_batch_size`; a comparison adds an arm for it, and follows the ratio of the two.
        evaluate: `model -> {"accuracy": 0.97, ...}` on held-out data; must leave the model in its mode.
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

    def make_accumulator(self, model: nn.Module, **options: Any) -> Accumulator:
        """An accumulator for a model of this workload; `options` replace the workload's own."""
        own = {name: getattr(self, name) for name in ("loss_fn", "weight", "collate", "batch_norm")}
        return Accumulator(model, **{**own, **options})
