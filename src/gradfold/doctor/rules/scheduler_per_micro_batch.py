"""GF008: scheduler steps per micro-batch (error).

`scheduler.step()` runs in every micro-batch, `optimizer.step()` in every n-th.

Why: The schedule runs n times too fast: warm-up is over after one n-th of its updates, and the learning rate reaches
its end when one n-th of the training is done.
Detection: In most windows a scheduler made as many steps between two steps of its optimizer as there were
micro-batches.
Limits: A schedule whose `T_max` or `total_steps` is a multiple of the loader's length was made for micro-batches, and
is not reported. Learning rates written into `param_groups` by hand are not seen.

Fix:
  (criterion(model(x), y) / 4).backward()
  if (i + 1) % 4 == 0:
      optimizer.step()
+     scheduler.step()
      optimizer.zero_grad()
- scheduler.step()
"""

from __future__ import annotations

from gradfold.doctor.events import EpochStart, SchedulerStep
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rule import Violation, Violations


def check(record: RunRecord) -> Violations:
    by_scheduler: dict[int, list[SchedulerStep]] = {}
    for step in record.log.of(SchedulerStep):
        by_scheduler.setdefault(step.scheduler, []).append(step)
    for history in record.accumulating:
        for scheduler, steps in by_scheduler.items():
            first, last, n = steps[0], steps[-1], history.window_length
            if all(step.optimizer != history.number for step in steps) or not _steps_in_windows(history, scheduler):
                continue
            if _is_made_for_micro_batches(record, history, first):
                continue
            length = first.horizon
            end = f" A schedule of {length} steps ends after {length // n} updates." if length else ""
            yield Violation(
                first.location,
                f"{first.name} advances in every micro-batch: {len(steps)} steps in {len(history.windows)} updates, "
                f"{n} times as fast as the updates it schedules. The learning rate went from {first.before:.3g} to "
                f"{last.after:.3g}.{end}",
                "Call `scheduler.step()` right after `optimizer.step()`, under the same `if`.",
            )


def _steps_in_windows(history: OptimizerHistory, scheduler: int) -> bool:
    """Whether most windows have as many scheduler steps as micro-batches (the first may have one less)."""
    alike = 0
    for index, window in enumerate(history.accumulating):
        count = sum(step.scheduler == scheduler for step in history.around(window, SchedulerStep))
        alike += count > 1 and count in (len(window), len(window) - (index == 0))
    return 2 * alike > len(history.accumulating)


def _is_made_for_micro_batches(record: RunRecord, history: OptimizerHistory, step: SchedulerStep) -> bool:
    """Whether the schedule is as long as a whole number of epochs in micro-batches, which is intentional then."""
    loaders = {one.loader_state.loader for window in history.windows for one in window.micro_batches}
    lengths = {one.length for one in record.log.of(EpochStart) if one.loader in loaders and one.length}
    return step.horizon is not None and any(step.horizon % length == 0 for length in lengths)
