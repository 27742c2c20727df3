"""Moments: mean and variance per channel of a part of a batch, merged with those of other parts.

Parts are merged by differences of their means (Chan, Golub and LeVeque 1983, eq. 2.1), since E[x^2] - E[x]^2 cancels
where the mean is large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and variance of `count` values per channel, in float32 at least."""

    mean: Tensor  # (C,)
    variance: Tensor  # (C,), the mean of squared differences (not unbiased)
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
        # The kernel returns its results in the dtype of running statistics; with momentum 0 these do not change.
        running = None if dtype == values.dtype else torch.zeros(channels, dtype=dtype, device=values.device)
        mean, variance = torch.batch_norm_update_stats(values, running, running, 0.0)
        return cls(mean, variance, values.numel() // channels)

    @classmethod
    @torch.no_grad()
    def of_unbiased(cls, mean: Tensor, variance: Tensor, count: int) -> Moments:
        """Of a layer's running statistics with momentum 1; both tensors are copied."""
        dtype = torch.promote_types(mean.dtype, torch.float32)
        return cls(mean.to(dtype, copy=True), variance.to(dtype) * ((count - 1) / max(1, count)), count)

    @torch.no_grad()
    def advance(self, mean: Tensor | None, variance: Tensor | None, momentum: float | Tensor) -> None:
        """Move running statistics by these moments; they have the unbiased variance."""
        unbiased = self.variance * (self.count / (self.count - 1))
        for running, now in ((mean, self.mean), (variance, unbiased)):
            if running is not None:
                running.copy_(running * (1 - momentum) + now * momentum)


@torch.no_grad()
def merge(parts: Sequence[Moments]) -> Moments:
    """The moments of all values of several parts."""
    parts = [part for part in parts if part.count] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    count = sum(part.count for part in parts)
    means = torch.stack([part.mean for part in parts])
    fractions = torch.tensor([[part.count / count] for part in parts], dtype=means.dtype)
    fractions = fractions.to(means.device, non_blocking=True)
    mean = means[0] + ((means - means[0]) * fractions).sum(0)
    variances = torch.stack([part.variance for part in parts])
    variance = ((variances + (means - mean).square()) * fractions).sum(0)
    return Moments(mean, variance, count)
