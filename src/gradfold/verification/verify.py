"""Verify: the proof of the law on a user's own model, in one process or across the ranks that it is wrapped for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TypeAlias, TypeVar, cast
from zlib import crc32

import torch
from torch import Tensor

from gradfold.accumulator import Accumulator
from gradfold.batch.batching import rows_together
from gradfold.batch.cutting import join_rows
from gradfold.batch.nesting import Batch
from gradfold.batch.rows import num_rows
from gradfold.batch.split import num_samples
from gradfold.distributed.ddp import find_process_group, parallel_modules, unwrapped, wrapped_as
from gradfold.distributed.fsdp import sharded_modules
from gradfold.distributed.process_group import ProcessGroup
from gradfold.engine.model_checks import dropping_modules
from gradfold.errors import BatchError, DistributedError, OptionError
from gradfold.messages import first_line, join_names
from gradfold.state.gradients import parameters_of
from gradfold.verification import causes
from gradfold.verification.comparison import SizeComparison, choose_sizes, compare, compare_with_fallbacks
from gradfold.verification.reference import relative_error
from gradfold.verification.runs import WholeRun, row_of, run_on_all_ranks, run_whole
from gradfold.verification.setup import Setup, Size, set_up
from gradfold.verification.verdict import Cause, SizeRow, Verdict, name_of, number
from gradfold.windows import LoadedWindow, LoopWindow

__all__ = ["verify"]

T = TypeVar("T")
Gradients: TypeAlias = dict[str, Tensor]


def verify(
    accumulator: Accumulator,
    batch: Batch,
    *,
    dtype: torch.dtype = torch.float64,
    micro_batch_sizes: Sequence[int] | None = None,
) -> Verdict:
    """Prove that the accumulated gradient of a batch is that of the whole batch, or name the cause by experiment.

    A copy of the model runs the batch at once in plain torch, and in micro-batches of several sizes by gradfold, each
    row with the random numbers that it had in the whole. The gradients are compared parameter by parameter. The model,
    its gradients and buffers, and torch's, numpy's and Python's random states stay as they are. The whole batch must
    fit; a small one proves as much. The accumulator's `backward=` is not called.

    Where the model is wrapped in DistributedDataParallel every rank calls this with rows of its own. Rank 0 proves the
    law for the rows of all ranks in one process; then all ranks accumulate theirs together, and the gradient is
    compared with that of one process with the whole batch. Every rank gets the same verdict.

    Args:
        accumulator: as it is used for training.
        batch: what `accumulator.backward(batch)` takes, of at least two rows; not a window.
        dtype: the precision of the copy. In float64 rounding cannot hide a mistake; where `loss_fn` does not run in
            it, the model's own is used, and the verdict says so.
        micro_batch_sizes: the sizes to try. None: a few, uneven ones and the accumulator's own among them.

    Returns:
        The verdict; print it.

    Raises:
        BatchError: the batch cannot be split by rows, has one row only, or is a window.
        OptionError: `dtype` or a size cannot work.
        ModelError: the model cannot be copied, or the accumulator refuses it.
        DistributedError: the model has `fully_shard` modules, or another rank has failed.
        LossError: `loss_fn` returned no loss.

    >>> import torch, gradfold
    >>> model = torch.nn.Linear(10, 5)
    >>> def loss_fn(model, batch):
    ...     return torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
    >>> batch = {"x": torch.randn(33, 10), "labels": torch.randint(0, 5, (33,))}
    >>> accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8)
    >>> gradfold.verify(accumulator, batch).ok
    True
    >>> batch["labels"][:9] = -100  # not counted by the mean, so samples are not what it is over
    >>> verdict = gradfold.verify(accumulator, batch)
    >>> verdict.ok, verdict.causes[0].name, verdict.causes[0].weight
    (False, 'weights', 'gradfold.token_count("labels")')
    """
    if not isinstance(accumulator, Accumulator):
        raise OptionError(f"verify got a {type(accumulator).__name__}; expected a gradfold.Accumulator and a batch.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise OptionError(f"dtype={dtype!r}; expected torch.float64, or another floating point dtype.")
    modules = list(accumulator.model.modules())
    if accumulator.distributed is not False and sharded_modules(modules):
        raise DistributedError(
            "verify runs on a copy of the model, and shards (fully_shard) cannot be copied. Verify the model as it is "
            "before fully_shard is applied, wrapped in DistributedDataParallel or alone."
        )
    ranks = None  # also where it was said that this process trains alone
    if parallel_modules(modules):
        ranks = find_process_group(modules, parameters_of(modules)[0].device, accumulator.distributed)
    if ranks is None:
        return _prove(accumulator, batch, dtype, micro_batch_sizes)
    return _prove_on_all_ranks(accumulator, batch, ranks, dtype, micro_batch_sizes)


def _prove(
    accumulator: Accumulator, batch: Batch, dtype: torch.dtype, micro_batch_sizes: Sequence[int] | None
) -> Verdict:
    """What `gradfold.verify` says of a model that trains in this process alone."""
    total = _count_rows(accumulator, batch)
    own = accumulator.token_budget or accumulator.micro_batch_size
    sizes = choose_sizes(total, own, micro_batch_sizes, _largest_group(accumulator, batch, total))
    with set_up(accumulator, batch, total, dtype=None) as own_precision:
        setup, whole, notes = _first_run(own_precision, dtype)
        hooked = setup.probe.hooked
        if hooked:  # which are not copied
            notes.append(f"hooks on gradients of {join_names(hooked)} did not run: they see those of micro-batches.")
        cause = causes.before_comparing(setup, whole)
        if cause is not None:
            return SizeComparison(setup, whole, attempts=[], repeat=math.nan).verdict([cause], notes)
        comparison = compare_with_fallbacks(setup, sizes, whole, notes)
        layers = causes.batch_norm_layers(comparison)
        if layers:
            is_accepted = setup.batch_norm is not None
            if not is_accepted:
                per_micro_batch = replace(comparison.setup, batch_norm="per_micro_batch")
                comparison = compare(per_micro_batch, sizes, comparison.whole)
            found = causes.batch_norm(layers, is_accepted, comparison.setup, sizes, notes)
        else:
            found = causes.find_causes(comparison, [own] if micro_batch_sizes is None else micro_batch_sizes, notes)
        if not any(bool(one.any()) for one in comparison.whole.gradients.values()):
            notes.append("the gradient of this batch is zero, which proves little.")
        return comparison.verdict(found, notes)


def _largest_group(accumulator: Accumulator, batch: Batch, total: int) -> int:
    batching = rows_together(accumulator.batching)
    return 1 if batching is None else max(map(len, batching.groups(batch, total)))


def _count_rows(accumulator: Accumulator, batch: Batch, least: int = 2) -> int:
    """The rows of a batch; raises BatchError where it cannot be split."""
    if isinstance(batch, (LoadedWindow, LoopWindow)):
        raise BatchError(
            "verify got a window. Pass a batch, as without accumulation: tensors with rows, or with collate= a list "
            "of samples."
        )
    batching = rows_together(accumulator.batching)
    count = num_rows if batching is None else batching.num_rows
    total = count(batch) if accumulator.collate is None else num_samples(batch)
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


def _prove_on_all_ranks(
    accumulator: Accumulator, batch: Batch, ranks: ProcessGroup, dtype: torch.dtype, asked: Sequence[int] | None
) -> Verdict:
    """What `gradfold.verify` says of a model that several processes train, each of which calls this; alike on all."""
    if rows_together(accumulator.batching) is not None:
        raise OptionError(
            f"verify on several ranks is not supported with batching={accumulator.batching}. Call it in one process."
        )
    own_rows = _count_rows(accumulator, batch, least=1)  # its errors come before any rank waits
    batches = ranks.exchange(batch)
    whole_batch = join_rows(batches, takes_first=True) if accumulator.collate is None else list(chain(*batches))
    found = _on_first(ranks, lambda: _prove(accumulator, whole_batch, dtype, asked))
    if not found.ok:
        note = f"this is what one process found with the rows of all {ranks.size} ranks; they were not run together."
        return replace(found, notes=(*found.notes, note))
    frozen = list(dropping_modules(unwrapped(accumulator.model)))  # no random numbers for the rows of other ranks

    def run_as_one() -> Gradients | None:
        with set_up(accumulator, whole_batch, found.num_rows, found.dtype, frozen) as setup:
            whole = run_whole(setup)
        return None if whole.recorded.values else {name: one.cpu() for name, one in whole.gradients.items()}

    expected = _on_first(ranks, run_as_one)
    if expected is None:
        text = "random numbers are drawn outside of modules, which cannot be handed to the rows of other ranks."
        return replace(found, ok=False, causes=(Cause("random", text),))
    rows: list[SizeRow] = []
    for size in _sizes(accumulator, own_rows, asked):
        with set_up(accumulator, batch, own_rows, found.dtype, frozen) as setup:
            gradients, num_run = run_on_all_ranks(setup, size, partial(wrapped_as, accumulator.model))
        rows.append(_row(ranks, size, num_run, {name: one.cpu() for name, one in gradients.items()}, expected))
    return _with_rows(found, ranks, rows, frozen)


def _sizes(accumulator: Accumulator, own_rows: int, asked: Sequence[int] | None) -> list[Size]:
    """The accumulator's own size, or those asked for, and micro-batches of two rows."""
    if asked is None and accumulator.token_budget is not None:
        return [accumulator.token_budget, 2]
    own = [accumulator.micro_batch_size or own_rows] if asked is None else asked
    return [*sorted({*own, 2})]


def _row(ranks: ProcessGroup, size: Size, num_run: int, gradients: Gradients, expected: Gradients) -> SizeRow:
    checksums = {
        name: crc32(one.contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for name, one in gradients.items()
    }
    found = ranks.exchange((num_run, checksums, relative_error(gradients, expected)))
    differing = [rank for rank, (_, of_rank, _) in enumerate(found) if of_rank != found[0][1]]
    failure = f"rank {differing[0]} has another gradient than rank 0" if differing else None
    return row_of(size, max(number for number, _, _ in found), found[0][2], failure, ranks.size)


def _with_rows(found: Verdict, ranks: ProcessGroup, rows: Sequence[SizeRow], frozen: list[str]) -> Verdict:
    error = max(row.error for row in rows)
    notes = [f"the whole batch is the rows of all {ranks.size} ranks together."]
    if frozen:
        notes.append(
            "on several ranks these modules ran in evaluation mode, since their random numbers cannot be handed to "
            f"the rows of other ranks: {join_names(frozen)}."
        )
    failure = next((row.failure for row in rows if row.failure is not None), None)
    if failure is None and not error <= found.tolerance:
        failure = f"the gradient of {ranks.size} ranks is {number(error)} off that of one process with their rows"
    cause = Cause(
        "ranks",
        f"{failure}, though in one process micro-batches change nothing. What loss_fn does depends on the rank, or "
        "parameters and buffers differ between ranks.",
    )
    return replace(
        found,
        ok=failure is None,
        max_relative_error=max(found.max_relative_error, error),
        sizes=(*found.sizes, *rows),
        causes=() if failure is None else (cause,),
        notes=(*found.notes, *notes),
    )


def _on_first(ranks: ProcessGroup, make: Callable[[], T]) -> T:
    """What rank 0 makes, on all of them; what it fails with is DistributedError on the others."""
    try:
        made = make() if ranks.rank == 0 else None
    except Exception as error:
        ranks.exchange((None, f"{type(error).__name__}: {error}"))
        raise
    value, failure = cast("tuple[T, str | None]", ranks.exchange((made, None))[0])
    if failure is not None:
        raise DistributedError(f"rank 0 failed in verify. {failure}")
    return value
