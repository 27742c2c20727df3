"""GF001: gradients zeroed inside a window (error).

`zero_grad()` (or `p.grad = None`, `p.grad.zero_()`) runs in every micro-batch, the step in every n-th.

Why: Only the last micro-batch of a window is in `.grad` when the step comes. The batch is n times smaller than it
looks, the noise is larger, and (n - 1) / n of the computation is discarded. Where the loss is divided by n, the
gradient is also n times too small.
Detection: In most windows, gradients that no step, no closure and no manual change of the parameters has used become
zero or None, in the same epoch as the step that follows, and they come from a line whose gradients reach a step at
other times.
Limits: Gradients that are copied elsewhere before they are zeroed (custom buffers) do not count as lost where `.grad`
is written by hand before the step. Gradients of other losses, such as those that a generator's loss leaves in the
discriminator, may be zeroed at any time.

Fix:
  for i, (x, y) in enumerate(loader):
-     optimizer.zero_grad()
      (criterion(model(x), y) / 4).backward()
      if (i + 1) % 4 == 0:
          optimizer.step()
+         optimizer.zero_grad()
"""

from __future__ import annotations

from collections import Counter

from gradfold.doctor.events import ZeroGrad
from gradfold.doctor.history import OptimizerHistory, RunRecord, epoch_of
from gradfold.doctor.rule import Violation, Violations


def lost_in_windows(history: OptimizerHistory) -> list[ZeroGrad]:
    """The zeroings inside windows, where most windows have one; else an empty list.

    Inside a window: the lost gradient comes from a line that updates the model at other times, and from the same epoch
    as the step that follows.
    """
    zero_grads, steps = [], set()
    for zero_grad in history.zero_grads:
        window = next((one for one in history.windows if one.step.at > zero_grad.at), None)
        if window is None or zero_grad.is_used or window.step.is_rewritten or not window.backwards:
            continue
        lost, kept = history.log.backwards[zero_grad.backwards[-1]], window.backwards[-1]
        if lost.context.call_path in history.call_paths and epoch_of(lost) == epoch_of(kept):
            zero_grads.append(zero_grad)
            steps.add(window.step.at)
    return zero_grads if len(zero_grads) > 1 and 2 * len(steps) > len(history.windows) else []


def check(record: RunRecord) -> Violations:
    for history in record.optimizers:
        zero_grads = lost_in_windows(history)
        if not zero_grads:
            continue
        location = Counter(one.location for one in zero_grads).most_common(1)[0][0]
        used = [one for window in history.windows for one in window.backwards]
        lost, kept, rows = sum(len(one.backwards) for one in zero_grads), len(used), max(one.rows for one in used)
        batch = f", with {rows} rows per update, not {rows * (lost + kept) // kept}" if rows else ""
        yield Violation(
            location,
            f"gradients are zeroed here before {history.optimizer}.step() has used them: of {lost + kept} "
            f"micro-batches only {kept} reached an update{batch}. Nothing accumulates; the others were computed for "
            "nothing.",
            "Zero right after the step and nowhere else: `if (i + 1) % n == 0: optimizer.step(); "
            "optimizer.zero_grad()`.",
        )
