"""GF005: leftover gradients leak into the next epoch or run (error).

Gradients that no step has used, or that one has used already, are in `.grad` when a new epoch, run or window begins,
and are added to it.

Why: That update is too large by the share of what is left over, and part of it was computed with older weights or for
another purpose. Without any zeroing, every update follows the sum of all gradients so far.
Detection: A window has more micro-batches than usual and they come from two epochs; or it contains backward passes that
a step has used; or those of a line that runs once, before the first batch is fetched.
Limits: A counter that runs on across epochs, so every window has its full length, is not a leak. Gradients that are
scaled by hand between updates (a custom momentum) are not reported.

Fix:
  for epoch in range(3):
-     for i, (x, y) in enumerate(loader):  # 10 batches: 4, 4, and 2 left over
-         (criterion(model(x), y) / 4).backward()
-         if (i + 1) % 4 == 0:
+     for i, (x, y) in enumerate(loader):
+         length = min(4, len(loader) - i // 4 * 4)
+         (criterion(model(x), y) / length).backward()
+         if (i + 1) % 4 == 0 or i + 1 == len(loader):
              optimizer.step()
              optimizer.zero_grad()
"""

from __future__ import annotations

from gradfold.doctor.history import OptimizerHistory, RunRecord, UpdateWindow, epoch_of
from gradfold.doctor.rule import Violation, Violations, num_micro_batches


def leaking(history: OptimizerHistory) -> list[UpdateWindow]:
    """The windows that begin with what another epoch left over, and so are too long."""
    windows = [one for one in history.windows if not one.step.num_reused and not one.is_by_gradfold]
    return [one for one in windows if one.crosses_epochs and len(one) > history.window_length]


def check(record: RunRecord) -> Violations:
    for history in record.optimizers:
        violation = _never_zeroed(history) or _between_epochs(history) or _before_training(history)
        if violation is not None:
            yield violation


def _never_zeroed(history: OptimizerHistory) -> Violation | None:
    stale = [one for one in history.windows if one.step.num_reused and one.backwards]
    if not stale or 2 * len(stale) < len(history.windows):
        return None
    if any(one.step.is_rewritten or one.step.ratio != 1 for one in stale):
        return None
    last = stale[-1]
    return Violation(
        last.step.location,
        f"gradients are not zeroed between updates: update {len(history.windows)} of this step still contains those of "
        f"{last.step.num_reused} backward passes that earlier steps used, besides {len(last.backwards)} new ones. "
        "Every update follows the sum of all gradients so far.",
        "Call `optimizer.zero_grad()` right after `optimizer.step()`.",
    )


def _between_epochs(history: OptimizerHistory) -> Violation | None:
    leaks, n = leaking(history), history.window_length
    if not leaks or n < 1:
        return None
    window = leaks[0]
    old = sum(epoch_of(one) != epoch_of(window.micro_batches[-1]) for one in window.micro_batches)
    return Violation(
        window.step.location,
        f"the first update of an epoch contains gradients of {num_micro_batches(old)} that the epoch before left over: "
        f"it sums {len(window)} micro-batches where the others have {n}, and is {len(window) / n:.3g} times too large, "
        "in part computed with older weights.",
        "Step at the end of an epoch for what is left, divided by its own length, or count micro-batches across "
        "epochs.",
    )


def _before_training(history: OptimizerHistory) -> Violation | None:
    if len(history.windows) < 2:
        return None
    first, *others = history.windows
    usual = {one.context.call_path for window in others for one in window.backwards}
    extra = [one for one in first.backwards if one.context.call_path not in usual]
    main = [one for one in first.backwards if one.context.call_path in usual]
    if not extra or not main or extra[-1].index > main[0].index:
        return None
    if extra[-1].loader_state.num_fetched or not main[0].loader_state.num_fetched:
        return None
    return Violation(
        extra[-1].location,
        "the gradient of this backward pass, before training, is still in `.grad` at the first update: it sums "
        f"{len(first.backwards)} gradients where the others sum {len(others[0].backwards)}.",
        "Call `model.zero_grad()` after a trial run, before training begins.",
    )
