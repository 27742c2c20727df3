"""A work: what is to be sized, as an accumulator hands it over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from gradfold.backward import BackPropagation
from gradfold.loss import LossFn
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
    """

    model: nn.Module
    loss_fn: LossFn
    precision: Precision
    back_propagate: BackPropagation
    specimen: Specimen
    device: torch.device
