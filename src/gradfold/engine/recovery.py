"""Recovery: a window runs until it is complete, through out-of-memory errors and gradients that are not finite.

Out of memory: the micro-batch that failed is halved, and with it all that are as large and not done. Where it has
changed nothing, the micro-batches that are done are kept; else the window begins again. Not finite: the micro-batches
run again, one gradient at a time, to see which one it comes from.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Literal, TypeAlias

import torch

from gradfold.batch.split import MicroBatch, MicroBatcher, split_further
from gradfold.engine.result import Recovery, Unit
from gradfold.engine.strategy import Run, Strategy, run_in_order
from gradfold.engine.window import Window
from gradfold.errors import (
    BatchError,
    DoesNotFitError,
    GradfoldError,
    ModelError,
    NonFiniteGradientError,
    OptionError,
    is_out_of_memory,
)
from gradfold.messages import join_names
from gradfold.state.gradients import non_finite_names
from gradfold.state.snapshot import Snapshot
from gradfold.weights import WindowWeights

OnNonFinite: TypeAlias = Literal["raise", "skip_update", "skip_micro_batch"]

_LOOK_FOR = "Look for sqrt or norm at 0, division by a standard deviation of 0, or overflow."


def check_on_non_finite(on_non_finite: str) -> None:
    """Raise OptionError unless the option is one of the three."""
    if on_non_finite not in ("raise", "skip_update", "skip_micro_batch"):
        raise OptionError(
            f'on_non_finite={on_non_finite!r}; expected "raise", "skip_update" (no gradient is left) or '
            '"skip_micro_batch" (the micro-batch and its weight are left out).'
        )


def run_with_recovery(
    window: Window,
    strategy: Strategy,
    run: Run,
    snapshot: Snapshot,
    micro_batcher: MicroBatcher,
    on_non_finite: OnNonFinite | None,
) -> Window:
    """Run what is pending of a window; returns it complete, or the one to check and run next.

    `run` is that of the strategy, or something around it, and is called where the window is not whole. Without a policy
    `on_non_finite` gradients that are not finite are left to a loss scaler.

    Raises:
        DoesNotFitError: one row does not fit, or the batch cannot be split.
        NonFiniteLossError, NonFiniteGradientError: something is not finite, and that was to be raised.
    """
    can_replay = window.context.coordinator.can_replay
    is_whole = can_replay and strategy.is_whole(window)  # else other ranks may have more micro-batches
    is_new = can_replay and micro_batcher.largest(window.micro_batches) > micro_batcher.fitting.proven
    outside, gradients = window.context.outside, snapshot.gradients
    if can_replay and (is_new or window.recoveries or outside.settled_version != window.context.version):
        window.watch(gradients, is_late=bool(window.recoveries))
    elif outside.known:
        gradients.set_aside(outside.known)
    if is_new and (is_whole or strategy.is_sequential(window.context)):
        run = _run_with_savepoints
    elif is_whole:
        run = run_in_order
    message = _attempt(window, run, snapshot)
    if message is not None:
        release_memory(window.device)
        return _halve(window, snapshot, micro_batcher, message)
    if _settle(window, snapshot, on_non_finite is not None) or on_non_finite is None:
        return _completed(window, strategy, snapshot) if window.recoveries else window.completed()
    if on_non_finite == "raise":
        window.losses.refuse_non_finite(_find_offender(window, strategy, snapshot))
        raise _gradient_error(window, strategy, snapshot, micro_batcher)
    if on_non_finite == "skip_micro_batch":
        rest = _leave_out(window, strategy, snapshot, micro_batcher)
        if rest is not None:
            return rest
    snapshot.discard()
    window.recoveries.append(Recovery("non_finite", "skipped_update", range(window.num_samples), 0, replayed=False))
    window.is_skipped = True
    return _completed(window, strategy, snapshot)


def does_not_fit(window: Window, error: ModelError) -> DoesNotFitError:
    """A refusal of a window whose micro-batches were halved on out-of-memory."""
    return DoesNotFitError(
        f"{_listed(window)} do not fit in memory at once, and fewer cannot be run: {error}",
        tuple(window.failed_sizes),
    )


def _attempt(window: Window, run: Run, snapshot: Snapshot) -> str | None:
    """Run what is pending; returns the message of an out-of-memory error.

    A separate function, since the traceback holds the tensors of the frames that failed until the function returns.
    """
    try:
        run(window, window.pending(), snapshot)
    except Exception as error:
        if not window.context.coordinator.can_replay or not is_out_of_memory(error):
            raise
        return str(error) or type(error).__name__
    return None


def _run_with_savepoints(window: Window, indices: Sequence[int], snapshot: Snapshot) -> None:
    for index in indices:
        snapshot.set_savepoint()
        run_in_order(window, [index])
        window.done |= {index}


def _settle(window: Window, snapshot: Snapshot, checks_gradient: bool) -> bool:
    """Every micro-batch has run: losses and gradients become those of all ranks; whether they are finite."""
    coordinator = window.context.coordinator
    coordinator.end(window.losses, snapshot.gradients)
    flags = snapshot.settle()
    is_finite = window.losses.settle(flags if checks_gradient else [])
    if window.weights.named:
        window.weights.check_names(window.losses.all_names, window.losses.metrics.all_names)
    return coordinator.all_finite(is_finite)


def _completed(window: Window, strategy: Strategy, snapshot: Snapshot) -> Window:
    """Record the effects of the recoveries, which are known at the end of the window."""
    has_drawn = snapshot.has_drawn()
    depends = strategy.depends_on_split(window.context)
    window.recoveries = [
        replace(
            recovery,
            changes_randomness=has_drawn and recovery.action != "skipped_update",
            changes_batch_statistics=depends and recovery.action == "halved",
        )
        for recovery in window.recoveries
    ]
    return window.completed()


def _halve(window: Window, snapshot: Snapshot, micro_batcher: MicroBatcher, message: str) -> Window:
    """Undo the micro-batch that failed, or the whole window, and split what is not done into smaller ones."""
    failed = window.micro_batches[window.current]
    window.failed_sizes.append(failed.size)
    if failed.num_units < 2:
        raise DoesNotFitError(
            f"{_named(failed)} not fit in memory{failed.where}: tried {_listed(window)} at once. The last error was: "
            f"{message}",
            tuple(window.failed_sizes),
        )
    keeps = snapshot.return_to_savepoint()
    if not keeps:
        snapshot.rewind()
    size = -(-len(failed.rows) // 2) * (failed.width or 1)
    try:
        smaller = _split_further(window, micro_batcher, size, window.done if keeps else frozenset())
    except GradfoldError as error:
        raise DoesNotFitError(
            f"{len(failed.rows)} rows{failed.where} do not fit in memory at once, and they cannot be run as fewer: "
            f"{error}",
            tuple(window.failed_sizes),
        ) from error
    unit: Unit = "rows" if failed.width is None else "padded tokens"
    window.recoveries.append(Recovery("out_of_memory", "halved", failed.rows, size, not keeps, unit=unit))
    return smaller


def _named(part: MicroBatch) -> str:
    """A micro-batch that is not split, with a verb."""
    if not part.is_counted:
        return "a batch whose rows cannot be counted does"
    return "one row does" if len(part.rows) < 2 else f"{len(part.rows)} rows that belong together do"


def _split_further(window: Window, micro_batcher: MicroBatcher, size: int, done: frozenset[int]) -> Window:
    parts: list[MicroBatch] = []
    places: dict[int, int] = {}
    for index, part in enumerate(window.micro_batches):
        if index in done:
            places[index] = len(parts)
            parts.append(part)
            continue
        window.check_unchanged(index)
        parts += split_further(part, size, micro_batcher.collate_rows, micro_batcher.is_even)
    smaller = window.again(parts, places)
    _check_totals(window.weights, smaller.weights)
    return smaller


def _find_offender(window: Window, strategy: Strategy, snapshot: Snapshot) -> int | None:
    """The micro-batch that made the losses of others not finite as well; None where each stands for itself."""
    if strategy.has_own_gradients or not window.losses.non_finite():
        return None
    snapshot.rewind()  # the buffers may hold what is not finite
    return strategy.find_offender(window)


def _gradient_error(
    window: Window, strategy: Strategy, snapshot: Snapshot, micro_batcher: MicroBatcher
) -> NonFiniteGradientError:
    """The error that names the first offending micro-batch."""
    coordinator = window.context.coordinator
    if not strategy.has_own_gradients:
        return joint_gradient_error(window)
    if not coordinator.can_replay:
        return gradient_error(window, {})
    try:
        inspected, bad = _inspect(window, strategy, snapshot, micro_batcher)
    except (BatchError, ModelError):  # it cannot run again
        inspected, bad = window, {}
    error = gradient_error(inspected, bad)
    found = coordinator.exchange(str(error) if bad else None)
    if not bad and any(found):
        rank, text = next((rank, text) for rank, text in enumerate(found) if text)
        return NonFiniteGradientError(f"rank {rank}: {text}", None, range(0), ())
    return error


def _leave_out(window: Window, strategy: Strategy, snapshot: Snapshot, micro_batcher: MicroBatcher) -> Window | None:
    """The window without the micro-batches whose gradient is not finite; None where that leaves nothing."""
    coordinator = window.context.coordinator
    inspected, bad = _inspect(window, strategy, snapshot, micro_batcher)
    rest = [part for index, part in enumerate(inspected.micro_batches) if index not in bad]
    found = coordinator.exchange((bool(bad), bool(rest)))
    if not any(is_bad for is_bad, _ in found):
        raise gradient_error(window, bad)
    for index in sorted(bad):
        rows = inspected.micro_batches[index].rows
        window.recoveries.append(Recovery("non_finite", "skipped_micro_batch", rows, 0, replayed=True))
    if not any(has_rest for _, has_rest in found):
        return None
    coordinator.reset_weights()
    snapshot.rewind()
    return window.again(rest)


def _inspect(
    window: Window, strategy: Strategy, snapshot: Snapshot, micro_batcher: MicroBatcher
) -> tuple[Window, dict[int, tuple[str, ...]]]:
    """Run the window again, one gradient at a time; gives the offending micro-batches, with their parameters."""
    for index in range(len(window.micro_batches)):
        window.check_unchanged(index)
    window = window.again(window.micro_batches)
    found: dict[int, tuple[str, ...]] = {}
    window.watch(snapshot.gradients, is_late=True)
    snapshot.rewind()
    while (message := _attempt(window, partial(inspect_each, strategy.run, found), snapshot)) is not None:
        release_memory(window.device)
        window = _halve(window, snapshot, micro_batcher, message)
    window.losses.settle()
    bad = {index: found[id(part)] for index, part in enumerate(window.micro_batches) if found[id(part)]}
    return window, dict.fromkeys(window.losses.non_finite(), ()) | bad


def inspect_each(
    run: Run, found: dict[int, tuple[str, ...]], window: Window, indices: Sequence[int], snapshot: Snapshot
) -> None:
    """Run micro-batches one by one, and drop each gradient.

    `found` gets the parameters whose gradient is not finite, by the `id` of a micro-batch, whose index may change.
    """
    for index in indices:
        snapshot.set_savepoint()
        run(window, [index], snapshot)
        found[id(window.micro_batches[index])] = non_finite_names(window.model)
        snapshot.empty_gradients()
        window.done |= {index}


def gradient_error(window: Window, bad: Mapping[int, tuple[str, ...]]) -> NonFiniteGradientError:
    """The error that names the first offending micro-batch; `bad`: these, with the names of parameters."""
    if not bad:
        return NonFiniteGradientError(
            "the gradient of the batch is not finite, and no micro-batch was found whose own gradient is not finite: "
            "their sum overflows, or loss_fn does not return the same twice.",
            None,
            range(window.num_samples),
            (),
        )
    index = min(bad)
    part, names = window.micro_batches[index], bad[index]
    return NonFiniteGradientError(
        f"the loss of micro-batch {index} of {len(window.micro_batches)}{part.where} is finite, its gradient of "
        f"{join_names(names, 3)} is not. {_LOOK_FOR} "
        'on_non_finite="skip_micro_batch" leaves such micro-batches out, "skip_update" such batches.',
        index,
        part.rows,
        names,
    )


def joint_gradient_error(window: Window) -> NonFiniteGradientError:
    """The error for micro-batches that share one gradient."""
    names = non_finite_names(window.model)
    return NonFiniteGradientError(
        f"the gradient of the batch is not finite ({join_names(names, 3)}), though its losses are. All micro-batches "
        f"share one backward pass, so the offending one cannot be named. {_LOOK_FOR} "
        'on_non_finite="skip_update" leaves such batches out.',
        None,
        range(window.num_samples),
        names,
    )


def _check_totals(whole: WindowWeights, parts: WindowWeights) -> None:
    """Raise GradfoldError where the denominator differs; sums of weights in float32 may differ by rounding."""
    for before, after in zip(whole.own_totals(), parts.own_totals(), strict=True):
        if not math.isclose(before, after, rel_tol=1e-6):
            raise GradfoldError(
                f"weight= gives {before:g} for the batch and {after:g} for the same rows in smaller micro-batches, so "
                "it is not a count of what the loss is a mean over."
            )


def _listed(window: Window) -> str:
    sizes: Sequence[int] = window.failed_sizes
    unit = "rows" if all(part.width is None for part in window.micro_batches) else "padded tokens"
    return f"{join_names([str(size) for size in sizes], len(sizes))} {unit if sizes[0] > 1 else unit[:-1]}"


def release_memory(device: torch.device) -> None:
    """Free what nothing refers to, and return what torch's allocator holds in reserve.

    Call it outside the `except` block, whose traceback holds the tensors of the frames that failed.
    """
    gc.collect()
    if device.type == "cpu":
        _keep_heap_small()
    elif (module := getattr(torch, device.type, None)) is not None:  # not every backend has one
        getattr(module, "empty_cache", lambda: None)()


@cache
def _keep_heap_small() -> None:
    """Have glibc take tensors of 128 KiB and more from the system one by one, and give them back at once.

    By default it learns to keep tensors of up to 32 MiB in its heap, whose holes fit only what is smaller: under a
    limit of the address space a half to a quarter of the rows go through then, and at last none. For the whole process,
    but only after an out-of-memory error. Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # other C libraries do not have it, nor this heap
        libc.mallopt(-3, 128 * 1024)
        libc.malloc_trim(0)
    except (OSError, TypeError, AttributeError):
        pass
