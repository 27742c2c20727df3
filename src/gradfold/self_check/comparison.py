"""A mixture: the gradient of some rows as it is made of the gradients of two parts of them, each row in one part.

For a loss that is a mean, whole = share * first + (1 - share) * second, with the shares that the weights give. Where
that fails, another relation often holds, and says what is wrong.

The tolerance of statistics that are computed twice: kernels with and without a graph, or on other rows, round.

A jitter: every parameter off by a few rounding errors for a while; what that moves is noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

__all__: list[str] = []

# Relative, by dtype; another dropout mask moves statistics by a percent and more.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
_OF_HALF_TYPES = 3e-2


def tolerance_of_types(dtypes: Iterable[torch.dtype | None]) -> float:
    """That of the lowest of some dtypes; None is none."""
    known = [_TOLERANCES.get(dtype, _OF_HALF_TYPES) for dtype in dtypes if dtype is not None]
    return max(known, default=_TOLERANCES[torch.float64])


_STEPS = 4.0  # at most, in units of the last place


class Perturbation:
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


Cause = Literal["weights", "sum", "seed", "coupled"]

# Relative differences that rounding explains, by the lowest precision met.
_TOLERANCES_OF_GRADIENTS = {torch.float64: 1e-8, torch.float32: 3e-4, torch.float16: 0.02, torch.bfloat16: 0.08}

# Parameters whose gradient is this much smaller than the largest one count as zero: what is in them is rounding.
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class GradientComparison:
    """Gradients of a whole and of its two parts, per parameter the same elements of each (1-d tensors).

    Attributes:
        whole, first, second: as they were back-propagated, with seeds in the ratio of 1, `share` and `1 - share`.
        share: what the first part makes up of the whole by its weight.
    """

    whole: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    share: float

    @classmethod
    def of(
        cls,
        whole: Sequence[Tensor | None],
        first: Sequence[Tensor | None],
        second: Sequence[Tensor | None],
        share: float,
    ) -> GradientComparison | None:
        """From gradients of which some may be missing, which are zero; None where all are."""
        found = [three for three in zip(whole, first, second, strict=True) if any(one is not None for one in three)]
        if not found:
            return None
        whole, first, second = map(_in_float64, zip(*map(_filled, found), strict=True))
        return cls(whole, first, second, share)

    @cached_property
    def errors(self) -> Tensor:
        """How far the parts are from the whole, per parameter, relative to the size of the parts."""
        missing = torch._foreach_sub(torch._foreach_sub(self.whole, self.first), self.second)
        return _root_mean_squares(list(missing)) / self._sizes

    def is_telling(self, tolerance: float) -> bool:
        """Whether the parts differ enough to tell weights from others."""
        return self.separation() >= min(100 * tolerance, 0.3)

    def separation(self) -> float:
        """How different the means over the two parts are: where they are equal, weights cannot be told from others."""
        if not 0 < self.share < 1:
            return 0.0
        first, second = torch._foreach_div(self.first, self.share), torch._foreach_div(self.second, 1 - self.share)
        return float((_root_mean_squares(list(torch._foreach_sub(first, second))) / self._sizes).max())

    def differences(self, other: Sequence[Tensor | None]) -> Tensor:
        """How far another run of the whole is from this one, on the scale of `errors`."""
        present = [gradient for gradient in other if gradient is not None]
        if [len(gradient) for gradient in present] != [len(gradient) for gradient in self.whole]:
            return torch.full((len(self.whole),), torch.inf)
        return (
            _root_mean_squares([a - b.cpu().double() for a, b in zip(self.whole, present, strict=True)]) / self._sizes
        )

    def explain(self, tolerance: float) -> tuple[Cause, float | None]:
        """The relation that holds instead; for "weights" with the share of the first part that fits."""
        sizes = self._sizes
        whole, first, second = (
            torch.cat([part / size / len(part) ** 0.5 for part, size in zip(parts, sizes.tolist(), strict=True)])
            for parts in (self.whole, self.first, self.second)
        )
        bound = tolerance * float(first.norm() + second.norm())
        a, b = _mean(first, self.share), _mean(second, 1 - self.share)
        if float((whole - a - b).norm()) < bound / (_nonzero(self.share) * _nonzero(1 - self.share)):
            return "sum", None
        if float((whole - self.share * first - (1 - self.share) * second).norm()) < bound:
            return "seed", None
        fitting = _fitting_share(whole, a, b)
        if fitting is not None and len(whole) > 2:
            rest = float((whole - fitting * a - (1 - fitting) * b).norm())
            # It must explain nearly all, since losses that couple samples weakly are almost a mixture, too.
            if rest < tolerance * float(a.norm() + b.norm()) and rest < 0.02 * float((whole - first - second).norm()):
                return "weights", fitting
        return "coupled", None

    @cached_property
    def _sizes(self) -> Tensor:
        parts = _root_mean_squares(self.first) + _root_mean_squares(self.second)
        sizes = torch.maximum(parts, _root_mean_squares(self.whole))
        return sizes.clamp(min=max(_NEGLIGIBLE * float(sizes.max()), 1e-300))


def tolerance_of(dtypes: Iterable[torch.dtype]) -> float:
    """The relative difference that computing in these may make."""
    return max(_TOLERANCES_OF_GRADIENTS.get(dtype, 0.0) for dtype in {torch.float64, *dtypes})


def _filled(three: tuple[Tensor | None, Tensor | None, Tensor | None]) -> list[Tensor]:
    present = next(one for one in three if one is not None)
    return [torch.zeros_like(present) if one is None else one for one in three]


def _in_float64(parts: Sequence[Tensor]) -> list[Tensor]:
    """On the host, in one transfer; in float64 since squares of small float32 numbers vanish."""
    if len({part.device for part in parts}) > 1:
        parts = [part.cpu() for part in parts]
    lengths = [part.numel() for part in parts]
    return list(torch.cat(tuple(parts)).cpu().double().split_with_sizes(lengths))


def _fitting_share(whole: Tensor, a: Tensor, b: Tensor) -> float | None:
    """The x that brings x * a + (1 - x) * b closest to the whole, where it is a share."""
    gap = a - b
    if not float(gap.norm()):
        return None
    fitting = float((whole - b).dot(gap) / gap.dot(gap))
    return fitting if -1e-3 <= fitting <= 1 + 1e-3 else None


def _mean(part: Tensor, share: float) -> Tensor:
    return part / _nonzero(share)


def _nonzero(share: float) -> float:
    return share or 1.0  # a part that weighs nothing was not run; its gradient is zero


def _root_mean_squares(parts: list[Tensor]) -> Tensor:
    lengths = torch.tensor([part.numel() for part in parts], dtype=torch.float64)
    return torch.stack(torch._foreach_norm(parts)) / lengths.sqrt()
