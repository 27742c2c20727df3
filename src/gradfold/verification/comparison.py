"""A comparison: the accumulated gradients at several sizes of micro-batches beside that of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from gradfold.batch.split import check_size, cut_range
from gradfold.engine.model_checks import dropping_modules
from gradfold.errors import OptionError
from gradfold.messages import join_names
from gradfold.packing.token_budget import TokenBudget
from gradfold.self_check.comparison import NOISE, perturbed, tolerance_of
from gradfold.verification.reference import differences, relative_error
from gradfold.verification.runs import Attempt, WholeRun, run_in_parts, run_whole
from gradfold.verification.setup import Setup, Size
from gradfold.verification.verdict import Cause, ParameterRow, Verdict

_LARGEST = 1e-3  # that noise may lift a tolerance to: errors of mistakes begin there
_MOST_MICRO_BATCHES = 16  # of the sizes that were not asked for
_NEGLIGIBLE = 1e-9  # of the whole gradient: what a parameter's error is relative to, at least


@dataclass(frozen=True)
class SizeComparison:
    """The whole batch, and each attempt to sum its gradient from micro-batches."""

    setup: Setup
    whole: WholeRun
    attempts: list[Attempt]
    repeat: float  # how far a second whole run was off

    @cached_property
    def noise(self) -> NoiseFloor:
        """What rounding explains, by the lowest precision that autograd saw; if that is exceeded, by that of all."""
        whole = self.whole  # a model in float64 may well compute its loss, or a metric, in float32
        if not self.attempts:
            return NoiseFloor(self._dtype, math.nan, 0.0)
        strict = _noise_floor(self, whole.dtypes)
        if self.max_error <= strict.tolerance or whole.recorded.dtypes <= whole.dtypes:
            return strict
        loose = _noise_floor(self, whole.recorded.dtypes | whole.dtypes)
        return loose if self.max_error <= loose.tolerance else strict

    @property
    def holds(self) -> bool:
        """Whether every gradient was seen to be that of the whole batch, to rounding."""
        return not math.isnan(self.noise.error) and self.max_error <= self.noise.tolerance

    @property
    def compared(self) -> list[Attempt]:
        """The attempts that say something, the one with the largest error first."""
        found = [attempt for attempt in self.attempts if not math.isnan(attempt.row.error)]
        return sorted(found, key=lambda attempt: -attempt.row.error)

    @property
    def max_error(self) -> float:
        """Of all sizes; NaN where none ran."""
        return self.compared[0].row.error if self.compared else math.nan

    @property
    def unknown(self) -> str | None:
        """An operator whose random numbers could not be handed to rows."""
        return next((attempt.unknown for attempt in self.attempts if attempt.unknown is not None), None)

    def verdict(self, causes: Sequence[Cause], notes: Sequence[str]) -> Verdict:
        """What was compared, with why it does not hold, if it does not."""
        noise = self.noise
        return Verdict(
            ok=not causes,
            max_relative_error=self.max_error,
            rows=self._rows(),
            sizes=tuple(one.row for one in self.attempts),
            tolerance=noise.tolerance,
            noise_floor=noise.error,
            dtype=self._dtype,
            precision=noise.precision,
            num_rows=self.setup.num_rows,
            causes=tuple(causes),
            notes=tuple(notes),
        )

    @property
    def _dtype(self) -> torch.dtype:
        return self.setup.dtype or min(self.setup.own_dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def _rows(self) -> tuple[ParameterRow, ...]:
        """Every parameter that requires a gradient, at the worst size with a gradient."""
        worst = next((attempt.differences for attempt in self.compared if attempt.differences), None)
        if worst is None:
            return ()
        norms = differences({}, self.whole.gradients)
        least = _NEGLIGIBLE * math.hypot(*norms.values())
        return tuple(
            ParameterRow(
                *(name, tuple(parameter.shape), norms.get(name, 0.0)),
                error=worst.get(name, 0.0) / (max(norms.get(name, 0.0), least) or 1.0),
            )
            for name, parameter in self.setup.fresh_model().named_parameters()
            if parameter.requires_grad
        )


class NoiseFloor(NamedTuple):
    """What rounding explains."""

    precision: torch.dtype  # the lowest met
    error: float  # how far some rounding errors in every parameter move the gradient; NaN where runs cannot be repeated
    tolerance: float  # the largest error allowed


def compare(setup: Setup, sizes: Sequence[Size], whole: WholeRun | None = None) -> SizeComparison:
    """Run the whole batch, twice, and each size."""
    whole = whole or run_whole(setup)
    again = run_whole(setup)
    attempts = [run_in_parts(setup, size, whole) for size in sizes]
    return SizeComparison(setup, whole, attempts, relative_error(again.gradients, whole.gradients))


def compare_with_fallbacks(setup: Setup, sizes: Sequence[Size], whole: WholeRun, notes: list[str]) -> SizeComparison:
    """Compare; with dropout frozen where its random numbers cannot be handed to rows."""
    comparison = compare(setup, sizes, whole)
    recorded = comparison.whole.recorded
    if (comparison.unknown is None and not recorded.values) or comparison.holds:
        return comparison
    if comparison.unknown is None:
        # It cannot matter which row has which random numbers if all have the same: a model may have sorted its rows.
        dims = {number: dim for attempt in comparison.attempts for number, dim in attempt.dims.items()}
        shared = compare(replace(setup, shared_randomness=(recorded, dims)), sizes)
        if not shared.holds:
            return comparison
        notes.append("all rows had the same random numbers, since it cannot be seen which row drew which.")
        return shared
    names = list(dropping_modules(setup.fresh_model()))
    if not names:
        return comparison
    notes.append(
        "these modules ran in evaluation mode, since their random numbers cannot be handed to rows: "
        f"{join_names([name or 'the model itself' for name in names])}."
    )
    return compare(replace(setup, frozen=setup.frozen | set(names)), sizes)


def choose_sizes(num_rows: int, own: Size | None, asked: Sequence[int] | None, least: int = 1) -> list[Size]:
    """The sizes of micro-batches to try, all smaller than the batch; a token budget first. `least`: of a group."""
    if asked is not None:
        for size in asked:
            check_size(size)
            if size >= num_rows:
                raise OptionError(
                    f"a micro-batch of {size} rows is the whole batch of {num_rows}, which proves nothing. Pass sizes "
                    f"from 1 to {num_rows - 1}."
                )
        if not asked:
            raise OptionError("micro_batch_sizes is empty. Pass one size at least, or None.")
        return [*sorted(set(asked))]
    # Into as few parts as cannot all be of one size.
    num_ragged = next((parts for parts in range(3, num_rows) if num_rows % parts), 2)
    likely = {1, 2, 3, -(-num_rows // 7), -(-num_rows // num_ragged), num_rows // 2}
    sizes = {size for size in likely if len(cut_range(num_rows, size)) <= _MOST_MICRO_BATCHES}
    if isinstance(own, int):
        sizes.add(own)
    found = sorted({max(size, least) for size in sizes if max(size, least) < num_rows})
    return [own, *found] if isinstance(own, TokenBudget) else [*found]


def _noise_floor(comparison: SizeComparison, dtypes: set[torch.dtype]) -> NoiseFloor:
    precision = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    base = tolerance_of([precision]).law
    if comparison.repeat > base:
        return NoiseFloor(precision, math.nan, base)
    error = comparison.repeat  # two runs may differ a little, by kernels that sum in any order
    for random_seed in range(2):
        model = comparison.setup.fresh_model()
        with perturbed(model.parameters(), random_seed, precision):
            moved = run_whole(comparison.setup, model)
        error = max(error, relative_error(moved.gradients, comparison.whole.gradients))
    return NoiseFloor(precision, error, max(base, min(NOISE * error, _LARGEST)))
