"""GF004: last window dropped (error).

An epoch's number of micro-batches is not a multiple of n, and the remainder reaches no update: it is zeroed when the
next epoch begins, or the script ends.

Why: The same computation is discarded every epoch. Without shuffling it is the same samples, which are never learned
from. An epoch shorter than a window never updates at all.
Detection: Gradients of fewer micro-batches than a window has are zeroed unused between two epochs, or remain in `.grad`
when the loader is exhausted and the script ends.
Limits: Loops that end on purpose before the data does are not reported. Epochs are known from `DataLoader`s and from
the whole numbers in the variables of `for` loops.

Fix:
- for epoch in range(3):
+ for window in gradfold.windows(loader, 4, model=model):  # 4, 4 and 2
+     for x, y in window:
+         window.backward(criterion(model(x), y))
+     optimizer.step()
      optimizer.zero_grad()
-     for i, (x, y) in enumerate(loader):  # 10 batches
-         (criterion(model(x), y) / 4).backward()
-         if (i + 1) % 4 == 0:
-             optimizer.step()
-             optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradfold.doctor.events import Backward, Fetch
from gradfold.doctor.history import OptimizerHistory, RunRecord, epoch_of, most_common_line
from gradfold.doctor.rule import Violation, Violations, num_micro_batches
from gradfold.doctor.rules.leftover_leaks import leaking
from gradfold.doctor.rules.zeroed_in_window import lost_in_windows


def check(record: RunRecord) -> Violations:
    for history in record.optimizers:
        tail = None if lost_in_windows(history) else next(_tails(record, history), None)
        if tail is None:
            continue
        m, rows = len(tail), sum(one.rows for one in tail)
        if history.windows:
            discarded = f"{rows} rows are computed and discarded" if rows else "they are computed and discarded"
            message = (
                f"the last {num_micro_batches(m)} of an epoch, after the last full window of {history.window_length}, "
                f"{'reach' if m > 1 else 'reaches'} no update: {discarded}, every epoch."
            )
            fix = (
                "Step for the last, shorter window, too, and divide by its own length: "
                "`if (i + 1) % n == 0 or i + 1 == len(loader)`; gradfold.windows(loader, n, model=model) does both."
            )
        else:
            message = (
                f"{m} backward passes ran and {history.optimizer}.step() never did: an epoch has fewer micro-batches "
                "than a window. Nothing was learned."
            )
            fix = "Step at the end of the epoch, too: `if (i + 1) % n == 0 or i + 1 == len(loader)`."
        yield Violation(tail[-1].location, message, fix)


def _tails(record: RunRecord, history: OptimizerHistory) -> Iterator[Sequence[Backward]]:
    """The micro-batches that reach no update, of each epoch."""
    n = history.window_length
    for zero_grad in history.zero_grads:
        some = most_common_line(record.log.backwards_at(zero_grad.backwards))
        if zero_grad.is_used or not 0 < len(some) < max(n, 2) or not _reaches_steps(history, some[0]):
            continue
        later = record.log.backwards[some[-1].index + 1 :]
        following = next((one for one in later if one.context.call_path == some[0].context.call_path), None)
        if n > 1 and (following is None or epoch_of(following) != epoch_of(some[-1])):
            yield some
    some = most_common_line(history.pending)
    if not some or not record.has_ended or leaking(history) or any(one.context.is_gradfold for one in some):
        return
    is_new = not history.windows and len(history.pending) > 1
    is_tail = n > 1 and len(some) < n and _reaches_steps(history, some[0])
    if (is_tail or is_new) and _is_exhausted(record, some[-1]):
        yield some


def _reaches_steps(history: OptimizerHistory, one: Backward) -> bool:
    """Whether a backward pass comes from a line whose gradients reach a step at other times."""
    return one.context.call_path in history.call_paths


def _is_exhausted(record: RunRecord, last: Backward) -> bool:
    """Whether the loop ended since there was no more data, and was not left early."""
    loader = last.loader_state.loader
    if loader is None or "transformers" in last.location.through:
        return True
    return any(one.is_end and one.loader == loader and one.at > last.at for one in record.log.of(Fetch))
