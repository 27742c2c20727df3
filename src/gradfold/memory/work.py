"""A work: what is to be sized, as an accumulator hands it over."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from gradfold.backward import BackPropagation
from gradfold.loss import LossFn
from gradfold.memory.company import Company
from gradfold.memory.specimen import Specimen
from gradfold.precision import Precision

__all__: list[str] = []


@dataclass(frozen=True)
class Work:
    """What is to be sized.

    Args:
        model: that is trained.
        loss_fn: as for `Accumulator`.
        precision: as for `Accumulator`, read.
        back_propagate: the backward pass of the engine.
        specimen: of a global batch.
        device: of the model.
        company: in which sizes are tried.
        reduces_once: whether ranks sum the gradients of shards once per window.
    """

    model: nn.Module
    loss_fn: LossFn
    precision: Precision
    back_propagate: BackPropagation
    specimen: Specimen
    device: torch.device
    company: Company = field(default_factory=Company)
    reduces_once: bool = False
