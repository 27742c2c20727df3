"""A proof in one process: the gradient of micro-batches compared with that of the whole batch in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from gradfold.accumulator import Accumulator
from gradfold.batch.nesting import Batch
from gradfold.batch.rows import num_rows
from gradfold.batch.split import split_samples
from gradfold.batchnorm.policy import batch_statistics_layers
from gradfold.engine.model_checks import dropping_modules, parameters_with_hooks
from gradfold.errors import BatchError, BatchNormError
from gradfold.messages import first_line, join_names
from gradfold.verification import causes
from gradfold.verification.comparison import SizeComparison, choose_sizes, compare, measure
from gradfold.verification.runs import WholeRun, run_whole
from gradfold.verification.setup import Setup, Size, set_up
from gradfold.verification.verdict import Cause, Verdict, name_of
from gradfold.windows import LoadedWindow, LoopWindow


def prove(
    accumulator: Accumulator, batch: Batch, dtype: torch.dtype, micro_batch_sizes: Sequence[int] | None
) -> Verdict:
    """What `gradfold.verify` says of a model that trains in this process alone."""
    total = count_rows(accumulator, batch)
    own = accumulator.token_budget or accumulator.micro_batch_size
    sizes = choose_sizes(total, own, micro_batch_sizes)
    with set_up(accumulator, batch, total, dtype=None) as own_precision:
        setup, whole, notes = _first_run(own_precision, dtype)
        hooked = parameters_with_hooks(setup.probe.model, setup.probe.parameters)
        if hooked:  # which are not copied
            notes.append(f"hooks on gradients of {join_names(hooked)} did not run: they see those of micro-batches.")
        cause = causes.before_comparing(setup, whole)
        if cause is not None:
            return SizeComparison(setup, whole, attempts=[], repeat=math.nan).verdict([cause], notes)
        comparison = _compare(setup, sizes, whole, notes)
        layers = _batch_norm_layers(comparison)
        if layers:
            found = [causes.batch_norm(tuple(layers), is_accepted=setup.batch_norm is not None)]
            if setup.batch_norm is None:
                per_micro_batch = replace(comparison.setup, batch_norm="per_micro_batch")
                comparison = compare(per_micro_batch, sizes, comparison.whole)
            found += _apart_from(layers, comparison.setup, sizes, notes)
        else:
            found = _causes(comparison, [own] if micro_batch_sizes is None else micro_batch_sizes, notes)
        if not any(bool(one.any()) for one in comparison.whole.gradients.values()):
            notes.append("the gradient of this batch is zero, which proves little.")
        return comparison.verdict(found, notes)


def count_rows(accumulator: Accumulator, batch: Batch, least: int = 2) -> int:
    """The rows of a batch; raises BatchError where it cannot be split."""
    if isinstance(batch, (LoadedWindow, LoopWindow)):
        raise BatchError(
            "verify got a window. Pass a batch, as without accumulation: tensors with rows, or with collate= a list "
            "of samples."
        )
    total = num_rows(batch) if accumulator.collate is None else len(split_samples(batch, None, list)[0].rows)
    if total < least:
        raise BatchError("the batch has one row only, which cannot be split. Pass at least two; 8 to 64 prove most.")
    return total


def _first_run(setup: Setup, dtype: torch.dtype) -> tuple[Setup, WholeRun, list[str]]:
    """The whole batch in this precision, or else in the model's own."""
    converted = replace(setup, dtype=dtype)
    try:
        return converted, run_whole(converted), []
    except Exception as error:
        if setup.own_dtypes == {dtype}:
            raise
        own, failure = join_names(sorted(map(name_of, setup.own_dtypes))), first_line(error)
    note = f"run in the model's own precision ({own}), since it fails in {name_of(dtype)} ({failure})."
    return setup, run_whole(setup), [note]


def _compare(setup: Setup, sizes: Sequence[Size], whole: WholeRun, notes: list[str]) -> SizeComparison:
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


def _batch_norm_layers(comparison: SizeComparison) -> dict[str, nn.Module]:
    """The layers that see micro-batches instead of the batch, refused or accepted."""
    is_refused = any(isinstance(attempt.failure, BatchNormError) for attempt in comparison.attempts)
    if not is_refused and comparison.setup.batch_norm != "per_micro_batch":
        return {}
    return dict(batch_statistics_layers(comparison.setup.fresh_model()))


def _apart_from(layers: dict[str, nn.Module], setup: Setup, sizes: Sequence[Size], notes: list[str]) -> list[Cause]:
    """What else is wrong when these BatchNorm layers use their running statistics."""
    if any(getattr(layer, "running_mean", None) is None for layer in layers.values()):
        return []
    # Of the sizes those with the fewest micro-batches: this is but a note.
    comparison = compare(replace(setup, frozen=setup.frozen | layers.keys()), sizes[-2:])
    if not comparison.holds:
        return [causes.after_comparing(comparison)]
    notes.append("with those layers in evaluation mode the law holds, so nothing else is wrong.")
    return []


def _causes(comparison: SizeComparison, needed: Sequence[Size | None], notes: list[str]) -> list[Cause]:
    """Why the law does not hold, if it does not; sizes that are not needed may fail."""
    if not comparison.holds:
        return [causes.after_comparing(comparison)]
    failed = [attempt for attempt in comparison.attempts if math.isnan(attempt.error)]
    for attempt in failed:
        if attempt.size in needed:
            return [causes.failing(attempt)]
    if failed:
        sizes = join_names([str(measure(attempt.size)[0]) for attempt in failed])
        notes.append(f"micro-batches of {sizes} do not run; the others say nothing about them.")
    return []
