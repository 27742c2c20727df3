"""The comparison of the gradients of a whole batch with those of its two parts, and what rounding explains.

For a mean, whole = share * first + (1 - share) * second; for a sum, whole = first + second. Where that fails another
relation may hold, and says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gradfold.state.attributes import keep_contents
from gradfold.state.gradients import local_part
from gradfold.torch_private import foreach_norm

PROOF = 4  # how many times the tolerance a difference must be, in order to count as proof
NOISE = 30  # how many times the effect of a rounding error in every parameter a difference must be

_STEPS = 4.0  # of a perturbation, at most, in units of the last place
_NEGLIGIBLE = 1e-3  # times the largest gradient: what is smaller counts as zero, since it is rounding

Gradients: TypeAlias = Sequence[Tensor | None]


class Tolerance(NamedTuple):
    """Relative differences that rounding explains."""

    law: float  # of the gradient over all parameters, on a CPU (of half types, a few roundings)
    gradient: float  # of the gradient of each parameter
    statistic: float  # of values computed twice, by other kernels; another dropout mask moves them by 1 % and more


_TOLERANCES = {
    torch.float64: Tolerance(law=1e-12, gradient=1e-8, statistic=1e-9),
    torch.float32: Tolerance(law=2e-6, gradient=3e-4, statistic=1e-3),
    torch.float16: Tolerance(law=0.005, gradient=0.02, statistic=0.03),
    torch.bfloat16: Tolerance(law=0.03, gradient=0.08, statistic=0.03),
}


def tolerance_of(dtypes: Iterable[torch.dtype | None]) -> Tolerance:
    """The tolerance of a computation by the lowest precision in it; None and integers have no rounding errors."""
    real = [dtype.to_real() for dtype in dtypes if dtype is not None and (dtype.is_floating_point or dtype.is_complex)]
    found = [_TOLERANCES.get(dtype, _TOLERANCES[torch.bfloat16]) for dtype in real]
    return max(found, default=_TOLERANCES[torch.float64])


@contextmanager
def perturbed(
    parameters: Iterable[nn.Parameter], random_seed: int, precision: torch.dtype | None = None
) -> Iterator[None]:
    """Move floating point parameters by a random number of rounding errors each; what that changes is noise.

    Of several seeds, since one may move nothing that counts, by luck; `precision`: whose rounding errors, if not their
    own dtype's.
    """
    kept = list(filter(None, (keep_contents(one) for one in parameters if one.is_floating_point())))
    try:
        with torch.no_grad():
            for number, (parameter, *_) in enumerate(kept):
                generator = torch.Generator().manual_seed(1000 * random_seed + number)
                own = local_part(parameter)  # replicas of one parameter move alike, since all ranks draw the same
                steps = torch.rand(own.shape, generator=generator).mul_(2 * _STEPS).sub_(_STEPS)
                own.add_(own * steps.to(own.device, own.dtype), alpha=torch.finfo(precision or own.dtype).eps)
        yield
    finally:
        for contents in kept:  # with their versions: else frozen parameters would seem to have been moved by the user
            contents.restore()


@dataclass(frozen=True)
class GradientComparison:
    """Gradients of a whole and of its two parts, as back-propagated from grad_outputs of 1, `share` and `1 - share`.

    Where losses add up, all grad_outputs are 1.
    """

    whole: Tensor  # (elements of all parameters,), as the next two; on the host, in float64, since squares may vanish
    first: Tensor
    second: Tensor
    lengths: list[int]  # of each parameter that any of the three has a gradient for
    share: float  # the normalized weight of the first part; its part of the rows where losses add up
    tolerance: float  # of the gradient of one parameter, relative
    adds_up: bool = False

    @classmethod
    def of(
        cls,
        whole: Gradients,
        first: Gradients,
        second: Gradients,
        share: float,
        tolerance: float,
        adds_up: bool = False,
    ) -> GradientComparison | None:
        """From one gradient per parameter, zero where it is missing; None where all are."""
        rows: list[list[Tensor]] = []
        for three in zip(whole, first, second, strict=True):
            present = next((one for one in three if one is not None), None)
            if present is not None:
                rows.append([torch.zeros_like(present) if one is None else one for one in three])
        if not rows:
            return None
        of_whole, of_first, of_second = map(_on_host, zip(*rows, strict=True))
        return cls(of_whole, of_first, of_second, [len(row[0]) for row in rows], share, tolerance, adds_up)

    @cached_property
    def errors(self) -> Tensor:
        """How far the parts are from the whole, per parameter, relative to the size of the parts."""
        return self._sizes_of(self.whole - self.first - self.second) / self._sizes

    @property
    def error(self) -> float:
        """The largest of the errors; NaN where one is."""
        return float(self.errors.max())

    @property
    def fits(self) -> bool:
        """Whether the parts make up the whole, to rounding."""
        return self.error <= self.tolerance

    @property
    def is_proof(self) -> bool:
        """Whether rounding cannot explain the error, as far as the tolerance tells."""
        return math.isfinite(self.error) and self.error > PROOF * self.tolerance

    @property
    def is_informative(self) -> bool:
        """Whether the parts differ enough to tell weights from others."""
        return self.contrast() >= min(100 * self.tolerance, 0.3)

    def contrast(self) -> float:
        """How different the means over the two parts are: where they are equal, weights cannot be told from others.

        Of sums, how large the smaller part is: without it, a sum cannot be told from a mean.
        """
        if self.adds_up:
            return float((torch.minimum(self._sizes_of(self.first), self._sizes_of(self.second)) / self._sizes).max())
        if not 0 < self.share < 1:
            return 0.0
        return float((self._sizes_of(self.first / self.share - self.second / (1 - self.share)) / self._sizes).max())

    def differences(self, other: Gradients, one: Gradients | None = None) -> Tensor:
        """How far a run is from another one, or from the whole, on the scale of `errors`."""
        runs = [[gradient for gradient in run if gradient is not None] for run in (other, one) if run is not None]
        if any(list(map(len, present)) != self.lengths for present in runs):
            return torch.full((len(self.lengths),), torch.inf)
        found = list(map(_on_host, runs))
        return self._sizes_of(found[0] - (self.whole if one is None else found[1])) / self._sizes

    def unscaled(self, scaled: Mapping[float, Gradients], noise: Tensor) -> float | None:
        """The part of the gradient, relative, that stays where grad_outputs are multiplied by these factors.

        The gradient is affine in them where that part is the same for every factor. None: there is no such part, or
        rounding explains it, which moves each parameter's gradient by `noise` on the scale of `errors`.
        """
        rests = []
        for factor, gradients in scaled.items():
            present = [gradient for gradient in gradients if gradient is not None]
            if list(map(len, present)) != self.lengths:
                return None
            rests.append((_on_host(present) - factor * self.whole) / (1 - factor))
        sizes = torch.stack(list(map(self._sizes_of, rests))).amin(0)
        is_proof = sizes > torch.clamp(noise, min=PROOF * self.tolerance) * self._sizes
        is_proof &= self._sizes_of(rests[0] - rests[1]) < 0.1 * sizes
        return float(rests[0].norm() / self.whole.norm()) if bool(is_proof.any()) else None

    def explain(self) -> tuple[str, float | None]:
        """What holds instead: "sum", "mean" or "weights" (with the first part's share that fits), or "coupled"."""
        share, rest, tolerance = self.share, 1 - self.share, self.tolerance
        lengths = torch.tensor(self.lengths)
        scale = (self._sizes * lengths.double().sqrt()).repeat_interleave(lengths)
        whole, first, second = self.whole / scale, self.first / scale, self.second / scale
        bound = tolerance * float(first.norm() + second.norm())
        if self.adds_up:
            a, b = first, second
            if float((whole - share * a - rest * b).norm()) < bound:
                return "mean", share
        else:
            a, b = first / (share or 1), second / (rest or 1)  # the means; a part of zero weight has a gradient of zero
            if float((whole - a - b).norm()) < bound / ((share or 1) * (rest or 1)):
                return "sum", None
        gap = a - b
        fitting = float((whole - b).dot(gap) / gap.dot(gap))  # brings the mean closest; NaN where there is no gap
        if -1e-3 <= fitting <= 1 + 1e-3 and len(whole) > 2:
            left = float((whole - fitting * a - (1 - fitting) * b).norm())
            # It must explain nearly all, since losses that couple samples weakly are almost a weighted mean, too.
            if left < tolerance * float(a.norm() + b.norm()) and left < 0.02 * float((whole - first - second).norm()):
                return "mean" if self.adds_up else "weights", fitting
        return "coupled", None

    @cached_property
    def _sizes(self) -> Tensor:
        sizes = torch.maximum(self._sizes_of(self.first) + self._sizes_of(self.second), self._sizes_of(self.whole))
        return sizes.clamp(min=max(_NEGLIGIBLE * float(sizes.max()), 1e-300))

    def _sizes_of(self, values: Tensor) -> Tensor:
        """Root mean squares, per parameter."""
        norms = torch.stack(foreach_norm(list(values.split_with_sizes(self.lengths))))
        return norms / torch.tensor(self.lengths, dtype=torch.float64).sqrt()


def _on_host(gradients: Sequence[Tensor]) -> Tensor:
    """All in one tensor, in one transfer where they are on one device."""
    if len({gradient.device for gradient in gradients}) > 1:
        gradients = [gradient.cpu() for gradient in gradients]
    return torch.cat(tuple(gradients)).cpu().double()
