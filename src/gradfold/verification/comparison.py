"""A comparison: the accumulated gradients at several sizes of micro-batches beside that of the whole batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gradfold.batch.split import check_size, cut_range
from gradfold.engine.window import Unit
from gradfold.errors import NonFiniteLossError, OptionError
from gradfold.packing.token_budget import TokenBudget
from gradfold.verification.reference import difference_norm, relative_error
from gradfold.verification.runs import Attempt, WholeRun, run_in_parts, run_jittered, run_whole
from gradfold.verification.setup import Setup
from gradfold.verification.verdict import ParameterRow, SizeRow

__all__: list[str] = []

# The law's figures on a CPU; of half types a few roundings.
_TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 0.005, torch.bfloat16: 0.03}
_NOISE = 30  # how many times the effect of a rounding error in every parameter is allowed
_LARGEST = 1e-3  # that noise may lift a tolerance to: errors of mistakes begin there
_MOST_MICRO_BATCHES = 16  # of the sizes that nobody asked for
_NEGLIGIBLE = 1e-9  # of the whole gradient: what a parameter's error is relative to, at least


@dataclass(frozen=True)
class SizeComparison:
    """The whole batch, and each attempt to make its gradient out of parts.

    Attributes:
        whole: the reference.
        attempts: one per size.
        repeat: how far a second run of the whole batch was from the first.
    """

    whole: WholeRun
    attempts: list[Attempt]
    repeat: float

    @property
    def compared(self) -> list[Attempt]:
        """The attempts that say something, the one with the largest error first."""
        found = [attempt for attempt in self.attempts if not math.isnan(attempt.error)]
        return sorted(found, key=lambda attempt: attempt.error, reverse=True)

    @property
    def max_error(self) -> float:
        """Of all sizes; NaN where none ran."""
        return self.compared[0].error if self.compared else math.nan

    @property
    def unknown(self) -> str | None:
        """An operator whose random numbers could not be handed to rows."""
        return next((attempt.unknown for attempt in self.attempts if attempt.unknown is not None), None)

    def sizes(self) -> tuple[SizeRow, ...]:
        """For a verdict."""
        return tuple(
            SizeRow(*measure(one.size), one.num_micro_batches, one.error, _first_line(one.failure))
            for one in self.attempts
        )

    def rows(self, model: nn.Module) -> tuple[ParameterRow, ...]:
        """For a verdict: every parameter that requires a gradient, at the worst size with a gradient."""
        worst = next((attempt.differences for attempt in self.compared if attempt.differences is not None), None)
        if worst is None:
            return ()
        expected = self.whole.gradients
        least = _NEGLIGIBLE * sum(difference_norm(one, None) ** 2 for one in expected.values()) ** 0.5
        rows = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                norm = difference_norm(expected.get(name), None)
                error = worst.get(name, 0.0) / (max(norm, least) or 1.0)
                rows.append(ParameterRow(name, tuple(parameter.shape), norm, error))
        return tuple(rows)


@dataclass(frozen=True)
class NoiseAllowance:
    """What rounding explains.

    Attributes:
        precision: the lowest met between parameters and loss.
        noise_floor: how far some rounding errors in every parameter move the gradient.
        tolerance: the largest error allowed.
        is_repeatable: whether two runs of the whole batch differ by no more than that.
    """

    precision: torch.dtype
    noise_floor: float
    tolerance: float
    is_repeatable: bool

    def may_be_noise(self, error: float) -> bool:
        """Whether an error could be rounding, though it is larger than what can be allowed."""
        return error <= _NOISE * self.noise_floor


def compare(specimen: Setup, sizes: Sequence[int | TokenBudget], whole: WholeRun | None = None) -> SizeComparison:
    """Run the whole batch, twice, and each size."""
    whole = whole or run_whole(specimen)
    again = run_whole(specimen)
    attempts = [run_in_parts(specimen, size, whole) for size in sizes]
    return SizeComparison(whole, attempts, relative_error(again.gradients, whole.gradients))


def allowance(specimen: Setup, comparison: SizeComparison) -> NoiseAllowance:
    """What to allow, by the lowest precision that autograd saw; only if that is exceeded, by the lowest seen at all.

    A model in float64 may well compute its loss, or a metric, in float32.
    """
    whole = comparison.whole
    strict = _allowance(specimen, comparison, whole.graph.dtypes)
    if comparison.max_error <= strict.tolerance or whole.recorded.dtypes <= whole.graph.dtypes:
        return strict
    loose = _allowance(specimen, comparison, whole.recorded.dtypes | whole.graph.dtypes)
    return loose if comparison.max_error <= loose.tolerance else strict


def choose_sizes(num_rows: int, own: int | TokenBudget | None, asked: list[int] | None) -> list[int | TokenBudget]:
    """The sizes of micro-batches to try, all smaller than the batch; a token budget first.

    Raises:
        OptionError: a size is no whole number from 1 to less than the batch.
    """
    if asked is not None:
        for size in asked:
            check_size(size)
            if size >= num_rows:
                raise OptionError(
                    f"a micro-batch of {size} rows is the whole batch of {num_rows}, which proves nothing. Give sizes "
                    f"from 1 to {num_rows - 1}."
                )
        if not asked:
            raise OptionError("micro_batch_sizes is empty. Give one size at least, or None.")
        return [*sorted(set(asked))]
    # Into as few parts as cannot all be of one size.
    num_ragged = next((parts for parts in range(3, num_rows) if num_rows % parts), 2)
    likely = {1, 2, 3, -(-num_rows // 7), -(-num_rows // num_ragged), num_rows // 2}
    sizes = {size for size in likely if len(cut_range(num_rows, size)) <= _MOST_MICRO_BATCHES}
    if isinstance(own, TokenBudget):
        return [own, *sorted(size for size in sizes if size < num_rows)]
    return [*sorted(size for size in sizes | ({own} if own else set()) if size < num_rows)]


def measure(size: int | TokenBudget) -> tuple[int, Unit]:
    """A size as a number of something."""
    if isinstance(size, TokenBudget):
        assert isinstance(size.max_tokens, int)
        return size.max_tokens, "padded tokens"
    return size, "rows"


def _allowance(specimen: Setup, comparison: SizeComparison, dtypes: set[torch.dtype]) -> NoiseAllowance:
    precision = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    base = _TOLERANCES.get(precision, 0.0)
    if comparison.repeat > base:
        return NoiseAllowance(precision, math.nan, base, is_repeatable=False)
    moved = [run_jittered(specimen, precision, seed) for seed in range(2)]
    # Two runs may differ a little, by kernels that add up in any order.
    noise = max(comparison.repeat, *(relative_error(one.gradients, comparison.whole.gradients) for one in moved))
    tolerance = max(base, min(_NOISE * noise, _LARGEST))
    return NoiseAllowance(precision, noise, tolerance, is_repeatable=True)


def _first_line(failure: Exception | None) -> str | None:
    if failure is None:
        return None
    if isinstance(failure, NonFiniteLossError):
        return f"the loss of micro-batch {failure.micro_batch} is {failure.value}"
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
