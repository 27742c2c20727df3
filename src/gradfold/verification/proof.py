"""A proof in one process: accumulation tried out on a model and a batch, beside the whole batch in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from gradfold.accumulator import Accumulator
from gradfold.batch.nesting import Batch
from gradfold.batch.rows import num_rows
from gradfold.batch.split import split_samples
from gradfold.batchnorm.per_micro_batch import batch_statistics_layers
from gradfold.engine.model_checks import dropping_modules, parameters_with_hooks
from gradfold.errors import BatchError, BatchNormError
from gradfold.packing.token_budget import TokenBudget
from gradfold.verification import causes
from gradfold.verification.comparison import NoiseAllowance, SizeComparison, allowance, choose_sizes, compare, measure
from gradfold.verification.runs import WholeRun, run_whole
from gradfold.verification.setup import Setup, Untouched, own_dtypes
from gradfold.verification.verdict import Cause, Verdict, listed, name_of
from gradfold.windows import LoadedWindow, LoopWindow

__all__: list[str] = []


def prove(
    accumulator: Accumulator,
    batch: Batch,
    *,
    dtype: torch.dtype = torch.float64,
    micro_batch_sizes: Sequence[int] | None = None,
) -> Verdict:
    """What `gradfold.verify` says of a model that trains in this process alone."""
    total = count_rows(accumulator, batch)
    asked = None if micro_batch_sizes is None else list(micro_batch_sizes)
    own = accumulator.cut_by
    sizes = choose_sizes(total, own, asked)
    with Untouched(accumulator) as untouched:
        specimen, whole, notes = _first_run(accumulator, batch, total, dtype, untouched)
        notes += _notes_on_hooks(accumulator.model)
        cause = causes.before_comparing(specimen, whole)
        if cause is not None:
            return _not_compared(specimen, cause, notes)
        needed = [own] if asked is None else asked
        return _Proof(specimen, sizes, needed, notes).run(whole)


def count_rows(accumulator: Accumulator, batch: Batch, least: int = 2) -> int:
    """The rows of a batch that can be cut.

    Raises:
        BatchError: it cannot.
    """
    if isinstance(batch, (LoadedWindow, LoopWindow)):
        raise BatchError(
            "verify got a window. Pass a batch, as one would be without accumulation: tensors with rows, or with "
            "collate= a list of samples."
        )
    total = num_rows(batch) if accumulator.collate is None else len(split_samples(batch, None, list)[0].rows)
    if total < least:
        raise BatchError("the batch has one row only, which cannot be cut. Pass two at least; 8 to 64 prove most.")
    return total


def _first_run(
    accumulator: Accumulator, batch: Batch, total: int, dtype: torch.dtype, untouched: Untouched
) -> tuple[Setup, WholeRun, list[str]]:
    """The whole batch in the precision asked for, or else in the model's own."""
    specimen = Setup(accumulator, batch, total, dtype, untouched)
    own = own_dtypes(accumulator.model)
    try:
        return specimen, run_whole(specimen), []
    except Exception as error:
        if own == {dtype}:
            raise
        failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    specimen = Setup(accumulator, batch, total, None, untouched)
    whole = run_whole(specimen)
    names = listed(sorted(map(name_of, own)))
    note = f"run in the model's own precision ({names}), since it fails in {name_of(dtype)} ({failure})."
    return specimen, whole, [note]


def _not_compared(specimen: Setup, cause: Cause, notes: list[str]) -> Verdict:
    dtype = _dtype_of(specimen)
    return Verdict(
        ok=False,
        max_relative_error=math.nan,
        rows=(),
        sizes=(),
        tolerance=0.0,
        noise_floor=math.nan,
        dtype=dtype,
        precision=dtype,
        num_rows=specimen.num_rows,
        causes=(cause,),
        notes=tuple(notes),
    )


class _Proof:
    """The comparison at all sizes, and what follows from it."""

    def __init__(
        self,
        specimen: Setup,
        sizes: list[int | TokenBudget],
        needed: Sequence[int | TokenBudget | None],
        notes: list[str],
    ) -> None:
        self._specimen = specimen
        self._sizes = sizes
        self._needed = needed  # sizes that must run; the others are extra
        self._notes = notes

    def run(self, whole: WholeRun) -> Verdict:
        """Compare, and explain what does not fit."""
        comparison = self._compare(whole)
        layers = self._batch_norm_layers(comparison)
        if not layers:
            return self._judge(comparison, [])
        found = [causes.batch_norm(tuple(layers), is_accepted=self._specimen.batch_norm is not None)]
        if self._specimen.batch_norm is None:
            self._specimen = self._specimen.with_batch_norm("per_micro_batch")
            comparison = compare(self._specimen, self._sizes, comparison.whole)
        return self._judge(comparison, found + self._apart_from(layers))

    def _compare(self, whole: WholeRun) -> SizeComparison:
        """Compare; with dropout frozen where its random numbers cannot be handed to rows."""
        comparison = compare(self._specimen, self._sizes, whole)
        recorded = comparison.whole.recorded
        if (comparison.unknown is None and not recorded.values) or self._holds(comparison):
            return comparison
        if comparison.unknown is None:
            return self._compare_with_equal_draws(comparison)
        names = list(dropping_modules(self._specimen.fresh_model()))
        if not names:
            return comparison
        self._specimen = self._specimen.with_frozen(names)
        self._notes.append(
            "these modules ran in evaluation mode, since their random numbers cannot be handed to rows: "
            f"{listed([name or 'the model itself' for name in names])}."
        )
        return compare(self._specimen, self._sizes)

    def _compare_with_equal_draws(self, comparison: SizeComparison) -> SizeComparison:
        """Whether it fits where it cannot matter whose random numbers are whose: a model may have sorted its rows."""
        dims = {number: dim for attempt in comparison.attempts for number, dim in attempt.dims.items()}
        specimen = self._specimen.with_equal_draws(comparison.whole.recorded, dims)
        equal = compare(specimen, self._sizes)
        if not equal.max_error <= allowance(specimen, equal).tolerance:
            return comparison
        self._specimen = specimen
        self._notes.append("all rows had the same random numbers, since it does not show whose they are.")
        return equal

    def _holds(self, comparison: SizeComparison) -> bool:
        return comparison.max_error <= allowance(self._specimen, comparison).tolerance

    def _batch_norm_layers(self, comparison: SizeComparison) -> dict[str, nn.Module]:
        """The layers that see micro-batches instead of the batch, refused or accepted."""
        if self._specimen.batch_norm == "exact":
            return {}
        refused = any(isinstance(attempt.failure, BatchNormError) for attempt in comparison.attempts)
        if refused or self._specimen.batch_norm is not None:
            return dict(batch_statistics_layers(self._specimen.fresh_model()))
        return {}

    def _apart_from(self, layers: dict[str, nn.Module]) -> list[Cause]:
        """What else is wrong when these BatchNorm layers use their running statistics."""
        if any(getattr(layer, "running_mean", None) is None for layer in layers.values()):
            return []
        frozen = self._specimen.with_frozen(list(layers))
        comparison = compare(frozen, self._sizes[-2:])  # fewest micro-batches: this is but a note
        allowed = allowance(frozen, comparison)
        if comparison.max_error <= allowed.tolerance:
            self._notes.append("with those layers in evaluation mode the law holds, so nothing else is wrong.")
            return []
        return [causes.after_comparing(frozen, comparison, allowed)]

    def _judge(self, comparison: SizeComparison, found: list[Cause]) -> Verdict:
        allowed = allowance(self._specimen, comparison)
        if not found and not (comparison.max_error <= allowed.tolerance and allowed.is_repeatable):
            found = [causes.after_comparing(self._specimen, comparison, allowed)]
        failed = [attempt for attempt in comparison.attempts if math.isnan(attempt.error)]
        if not found and any(attempt.size in self._needed for attempt in failed):
            found = [causes.failing(next(attempt for attempt in failed if attempt.size in self._needed))]
        if not found and failed:
            sizes = listed([str(measure(attempt.size)[0]) for attempt in failed])
            self._notes.append(f"micro-batches of {sizes} do not run; the others say nothing about them.")
        if not any(bool(one.any()) for one in comparison.whole.gradients.values()):
            self._notes.append("the gradient of this batch is zero, which proves little.")
        return self._verdict(comparison, allowed, found)

    def _verdict(self, comparison: SizeComparison, allowed: NoiseAllowance, found: list[Cause]) -> Verdict:
        return Verdict(
            ok=not found,
            max_relative_error=comparison.max_error,
            rows=comparison.rows(self._specimen.fresh_model()),
            sizes=comparison.sizes(),
            tolerance=allowed.tolerance,
            noise_floor=allowed.noise_floor,
            dtype=_dtype_of(self._specimen),
            precision=allowed.precision,
            num_rows=self._specimen.num_rows,
            causes=tuple(found),
            notes=tuple(self._notes),
        )


def _notes_on_hooks(model: nn.Module) -> list[str]:
    """Hooks on parameters are not copied along."""
    names = parameters_with_hooks(model, list(model.parameters()))
    if not names:
        return []
    return [f"the hooks on gradients of {listed(names)} did not run: they see the gradient of each micro-batch."]


def _dtype_of(specimen: Setup) -> torch.dtype:
    return specimen.dtype or min(own_dtypes(specimen.accumulator.model), key=lambda dtype: torch.finfo(dtype).eps)
