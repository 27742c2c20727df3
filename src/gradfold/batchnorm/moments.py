"""Moments: mean and variance per channel of some of a batch's values, merged with those of the others.

Parts are merged by differences of their means, never by sums of squares (Chan, Golub and LeVeque 1983, eq. 2.1), so
that they are right wherever the mean is: E[x^2] - E[x]^2 cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__: list[str] = []


@dataclass(frozen=True, slots=True)
class Moments:
    """Of `count` values per channel; both tensors are (C,), in float32 at least.

    Attributes:
        mean: of the values.
        variance: the mean of their squared differences from it (not unbiased).
        count: how many.
    """

    mean: Tensor
    variance: Tensor
    count: int

    @classmethod
    @torch.no_grad()
    def of(cls, values: Tensor) -> Moments:
        """Of a tensor (N, C, ...), by the kernel of torch's own BatchNorm; zeros where it is empty."""
        channels = values.shape[1]
        dtype = torch.promote_types(values.dtype, torch.float32)
        if not values.numel():
            empty = torch.zeros(channels, dtype=dtype, device=values.device)
            return cls(empty, empty, 0)
        # The kernel gives its results in the dtype of these, which it also moves, by nothing.
        running = (
            [torch.zeros(channels, dtype=dtype, device=values.device) for _ in "mv"]
            if dtype != values.dtype
            else [None] * 2
        )
        mean, variance = torch.batch_norm_update_stats(values, running[0], running[1], 0.0)
        return cls(mean, variance, values.numel() // channels)

    @property
    def unbiased_variance(self) -> Tensor:
        """The variance as running statistics have it."""
        return self.variance * (self.count / (self.count - 1))


@torch.no_grad()
def merge(parts: Sequence[Moments]) -> Moments:
    """The moments of all values of several parts."""
    parts = [part for part in parts if part.count] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    count = sum(part.count for part in parts)
    means = torch.stack([part.mean for part in parts])
    shares = torch.tensor([[part.count / count] for part in parts], dtype=means.dtype).to(
        means.device, non_blocking=True
    )
    mean = means[0] + ((means - means[0]) * shares).sum(0)
    variances = torch.stack([part.variance for part in parts])
    variance = ((variances + (means - mean).square()) * shares).sum(0)
    return Moments(mean, variance, count)
