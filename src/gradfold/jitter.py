"""A jitter: every parameter off by a few rounding errors for a while; what that moves is noise."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

__all__: list[str] = []

_STEPS = 4.0  # at most, in units of the last place


class Jitter:
    """Moves floating point parameters while the `with` block runs, by a random number of rounding errors each.

    Args:
        parameters: those to move.
        seed: other seeds move them otherwise. One may move nothing that counts, by luck.
        precision: whose rounding errors; None: those of each parameter's own dtype.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], seed: int, precision: torch.dtype | None = None) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.is_floating_point()]
        self._seed = seed
        self._precision = precision

    @torch.no_grad()
    def __enter__(self) -> None:
        self._kept = [parameter.detach().clone() for parameter in self._parameters]
        for number, parameter in enumerate(self._parameters):
            generator = torch.Generator().manual_seed(1000 * self._seed + number)
            steps = torch.rand(parameter.shape, generator=generator).mul_(2 * _STEPS).sub_(_STEPS)
            steps = steps.to(parameter.device, parameter.dtype)
            parameter.add_(parameter * steps, alpha=torch.finfo(self._precision or parameter.dtype).eps)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(kept)
