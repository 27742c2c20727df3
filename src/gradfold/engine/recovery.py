"""A replay: a window run again, in part or whole, after a fault, until it goes through or cannot.

Out of memory: the failed micro-batch is halved, and with it all that are as large and not done yet. Where it has left
no trace the micro-batches that are done are kept; else the window begins again. The batch, its denominator and the
number of updates stay the same.

Not finite: the micro-batches run again, one gradient at a time, to see whose it is.

The out-of-memory error: how it looks on each device, and giving memory back after it.

Sources: `torch.OutOfMemoryError` (accelerators), c10's CPU allocator (a `RuntimeError` with a text of its own), and
Python's `MemoryError`. The kernel's out-of-memory killer ends a process without an error: nothing can be caught there.
"""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from gradfold.batch.split import MicroBatch
from gradfold.engine.coordinator import Coordinator
from gradfold.engine.non_finite import Inspection, accuse, accuse_all
from gradfold.engine.window import Backward, Forward, Recovery, Schedule, Unit, Window, WindowResult
from gradfold.errors import (
    BatchError,
    DoesNotFitError,
    GradfoldError,
    ModelError,
    NonFiniteGradientError,
    OptionError,
    is_out_of_memory,
)
from gradfold.state.snapshot import Snapshot
from gradfold.weights import WindowWeights

if TYPE_CHECKING:
    from gradfold.engine.micro_batcher import FittingSize

__all__: list[str] = []


def give_back(device: torch.device) -> None:
    """Free what nothing refers to, and return what torch's allocator holds in reserve.

    Call it outside the `except` block, whose traceback holds the tensors of the frames that failed.
    """
    gc.collect()
    if device.type == "cpu":
        _keep_heap_small()
    elif device.type != "meta":
        torch.get_device_module(device).empty_cache()


@cache
def _keep_heap_small() -> None:
    """Have glibc take tensors of 128 KiB and more from the system one by one, and give them back at once.

    By default it learns to keep tensors of up to 32 MiB in its heap, whose holes fit only what is smaller: under a
    limit of the address space a half to a quarter of the rows go through then, and at last none. For the whole process,
    but only where memory has run out. Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # other C libraries have none, and another heap
        libc.mallopt(-3, 128 * 1024)
        libc.malloc_trim(0)
    except (OSError, TypeError, AttributeError):
        pass


OnNonFinite: TypeAlias = Literal["raise", "skip_update", "skip_micro_batch"]

FindCulprit: TypeAlias = Callable[[Window], int | None]

Recut: TypeAlias = Callable[[MicroBatch, int], list[MicroBatch]]
"""Cuts a micro-batch into parts of at most this size (`MicroBatch.size`)."""


def check_on_non_finite(on_non_finite: str) -> None:
    """Raise OptionError unless the option is one of the three."""
    if on_non_finite not in ("raise", "skip_update", "skip_micro_batch"):
        raise OptionError(
            f'on_non_finite={on_non_finite!r}; expected "raise", "skip_update" (no gradient is left) or '
            '"skip_micro_batch" (the micro-batch and its weight are left out).'
        )


class Cautious:
    """The plain schedule, which remembers where each micro-batch began: for sizes that have not gone through yet."""

    def __init__(self, transaction: Snapshot) -> None:
        self._transaction = transaction
        self.savepoint = transaction.savepoint()
        self.done: set[int] = set()

    def __call__(self, indices: Sequence[int], forward: Forward, backward: Backward) -> None:
        """Run the micro-batches in order."""
        self.done = set()
        for index in indices:
            self.savepoint = self._transaction.savepoint()
            backward(forward(index))
            self.done.add(index)


class Replay:
    """Runs one window to its end.

    Args:
        transaction: what the window leaves its gradient in.
        agreement: with other processes, if there are any.
        prepare: gives the schedule for a window that begins; it may look at the window first, or refuse it.
        recut: for micro-batches that do not fit.
        fitting_size: learns from those.
        normalizes: whether layers normalize by micro-batch, so that a halved one has other statistics.
        find_culprit: where micro-batches depend on each other, so that one that is not finite spoils all: finds it.

    Attributes:
        terms: the names of the loss terms, once it has run.
    """

    def __init__(
        self,
        transaction: Snapshot,
        agreement: Coordinator,
        prepare: Callable[[Window], Schedule],
        recut: Recut,
        fitting_size: FittingSize,
        normalizes: bool,
        find_culprit: FindCulprit | None,
    ) -> None:
        self._transaction = transaction
        self._agreement = agreement
        self._prepare = prepare
        self._recut = recut
        self._fitting_size = fitting_size
        self._normalizes = normalizes
        self._find_culprit = find_culprit
        self._sizes: list[int] = []  # that did not fit
        self._unit: Unit = "rows"  # of sizes
        self._recoveries: list[Recovery] = []
        self.terms: Collection[str] = ()

    def run(self, window: Window, on_non_finite: OnNonFinite | None) -> WindowResult:
        """Run a window; None leaves gradients that are not finite to a loss scaler.

        Raises:
            DoesNotFitError: one row does not fit, or the batch cannot be cut.
            NonFiniteLossError, NonFiniteGradientError: something is not finite, and that was to be raised.
        """
        self._transaction.begin()
        try:
            result = self._run(window, on_non_finite)
        except ModelError as error:
            if not self._sizes:
                raise
            raise DoesNotFitError(
                f"{_listed(self._sizes, self._unit)} do not fit in memory at once, and fewer cannot be run: {error}",
                tuple(self._sizes),
            ) from error
        for recovery in self._recoveries:
            if recovery.action == "halved":
                self._fitting_size.shrink(recovery.micro_batch_size)
        return result

    def _run(self, window: Window, on_non_finite: OnNonFinite | None) -> WindowResult:
        window = self._run_through(window)
        while not self._settle(window, on_non_finite) and on_non_finite is not None:
            if on_non_finite == "raise":
                window.losses.refuse_non_finite(self._culprit(window))
                raise self._accuse(window)
            rest = None if on_non_finite == "skip_update" else self._leave_out(window)
            if rest is None:
                return self._skip(window)
            window = rest
        self.terms = window.losses.names
        return replace(window.result(), recoveries=self._report()) if self._recoveries else window.result()

    def _settle(self, window: Window, on_non_finite: OnNonFinite | None) -> bool:
        self._agreement.end(window.losses, window.metrics, self._transaction.gradients)
        flags = self._transaction.settle()
        is_finite = window.losses.settle(flags if on_non_finite is not None else [])
        window.check_names()
        return self._agreement.all_finite(is_finite)

    def _run_through(self, window: Window, around: Callable[[Schedule], Schedule] | None = None) -> Window:
        """Run a window, halving what does not fit; `around` goes around its schedule."""
        schedule: Schedule | None = None
        while True:
            if schedule is None:
                schedule = self._prepare(window) if around is None else around(self._prepare(window))
            message = _attempt(window, schedule, self._agreement.can_replay)
            if message is None:
                return window
            give_back(window.device)
            window = self._halve(window, schedule, message)
            if not window.done:
                schedule = None  # its savepoint holds gradients that were dropped

    def _halve(self, window: Window, schedule: Schedule, message: str) -> Window:
        """Undo the micro-batch that failed, or the whole window, and cut what is not done into smaller ones."""
        failed = window.micro_batches[window.current]
        self._sizes.append(failed.size)
        self._unit = "rows" if failed.width is None else "padded tokens"
        if len(failed.rows) < 2:
            raise DoesNotFitError(
                f"one row does not fit in memory{failed.where}: tried {_listed(self._sizes, self._unit)} at once. The "
                f"last error was: {message}",
                tuple(self._sizes),
            )
        done = self._undo(window, schedule)
        size = -(-len(failed.rows) // 2) * (failed.width or 1)
        try:
            smaller = self._cut_anew(window, size, done or frozenset())
        except GradfoldError as error:
            raise DoesNotFitError(
                f"{len(failed.rows)} rows{failed.where} do not fit in memory at once, and they cannot be run as "
                f"fewer: {error}",
                tuple(self._sizes),
            ) from error
        self._recoveries.append(Recovery("out_of_memory", "halved", failed.rows, size, done is None, unit=self._unit))
        return smaller

    def _undo(self, window: Window, schedule: Schedule) -> frozenset[int] | None:
        """Undo the micro-batch that failed and say which are done; None where the window has to begin again."""
        if isinstance(schedule, Cautious) and self._transaction.go_back_to(schedule.savepoint):
            return window.done | schedule.done
        self._transaction.rewind()
        return None

    def _cut_anew(self, window: Window, size: int, done: frozenset[int]) -> Window:
        parts: list[MicroBatch] = []
        places: dict[int, int] = {}
        for index, part in enumerate(window.micro_batches):
            if index in done:
                places[index] = len(parts)
                parts.append(part)
                continue
            window.check_unchanged(index)
            parts += self._recut(part, size)
        smaller = window.again(parts, places)
        _check_totals(window.weights, smaller.weights)
        return smaller

    def _inspect(self, window: Window) -> tuple[Window, Mapping[int, tuple[str, ...]]]:
        """Run the window again, one gradient at a time; gives the micro-batches to blame, with their parameters."""
        for index in range(len(window.micro_batches)):
            window.check_unchanged(index)
        window = window.again(window.micro_batches)
        self._transaction.rewind()
        inspection = Inspection(window.model, self._transaction)
        window = self._run_through(window, inspection.around)
        window.losses.settle()
        return window, dict.fromkeys(window.losses.non_finite(), ()) | inspection.bad

    def _culprit(self, window: Window) -> int | None:
        """The micro-batch that made the losses of others not finite as well; None where each has its own to answer."""
        if self._find_culprit is None or not window.losses.non_finite():
            return None
        self._transaction.rewind()  # the buffers may hold what is not finite
        return self._find_culprit(window)

    def _accuse(self, window: Window) -> NonFiniteGradientError:
        """The error that names the first micro-batch to blame."""
        if self._find_culprit is not None:
            return accuse_all(window)
        if not self._agreement.can_replay:
            return accuse(window, {})
        self._agreement.reopen()
        try:
            window, bad = self._inspect(window)
        except BatchError:  # it cannot run again
            bad = {}
        error = accuse(window, bad)
        found = self._agreement.share(str(error) if bad else None)
        if not bad and any(found):
            rank, text = next((rank, text) for rank, text in enumerate(found) if text)
            return NonFiniteGradientError(f"rank {rank}: {text}", None, range(0), ())
        return error

    def _leave_out(self, window: Window) -> Window | None:
        """Run the window without the micro-batches whose gradient is not finite; None where that leaves nothing."""
        self._agreement.reopen()
        inspected, bad = self._inspect(window)
        rest = [part for index, part in enumerate(inspected.micro_batches) if index not in bad]
        found = self._agreement.share((bool(bad), bool(rest)))
        if not any(is_bad for is_bad, _ in found):
            raise accuse(window, bad)
        for index in sorted(bad):
            rows = inspected.micro_batches[index].rows
            self._recoveries.append(Recovery("non_finite", "skipped_micro_batch", rows, 0, replayed=True))
        if not any(has_rest for _, has_rest in found):
            return None
        self._agreement.begin_again()
        window = inspected.again(rest)
        self._transaction.rewind()
        return self._run_through(window)

    def _skip(self, window: Window) -> WindowResult:
        result = window.result()
        self._transaction.give_up()
        rows = range(window.num_samples)
        self._recoveries.append(Recovery("non_finite", "skipped_update", rows, 0, replayed=False))
        return replace(result, recoveries=self._report(), is_skipped=True)

    def _report(self) -> tuple[Recovery, ...]:
        """The recoveries, with what the end of the window shows of their effect."""
        draws = self._transaction.has_drawn()
        return tuple(
            replace(
                recovery,
                changes_randomness=draws and recovery.action != "skipped_update",
                changes_batch_statistics=self._normalizes and recovery.action == "halved",
            )
            for recovery in self._recoveries
        )


def _attempt(window: Window, schedule: Schedule, can_replay: bool) -> str | None:
    """Run a window; gives the message where memory runs out.

    A function of its own, since the traceback holds the tensors of the frames that failed until it is left.
    """
    try:
        window.run(schedule)
    except Exception as error:
        if not can_replay or not is_out_of_memory(error):
            raise
        return str(error) or type(error).__name__
    return None


def _check_totals(whole: WindowWeights, parts: WindowWeights) -> None:
    """Raise GradfoldError where the denominator is another; sums of weights in float32 may differ by rounding."""
    for before, after in zip(whole.own_totals(), parts.own_totals(), strict=True):
        if not math.isclose(before, after, rel_tol=1e-6):
            raise GradfoldError(
                f"weight= gives {before:g} for the batch and {after:g} for the same rows in smaller "
                "micro-batches, so it is no count of what the loss is a mean over."
            )


def _listed(sizes: Sequence[int], unit: Unit) -> str:
    names = [str(size) for size in sizes]
    text = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{text} {unit if sizes[0] > 1 else unit[:-1]}"
