"""GF008: a learning-rate schedule made for updates advances in every micro-batch."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.events import EpochStart, SchedulerStep
from gradfold.doctor.finding import ERROR, Observation
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.accumulating:
        for scheduler in sorted(
            {tick.scheduler for tick in case.events(SchedulerStep) if tick.ledger == training.ledger}
        ):
            ticks = [tick for tick in case.events(SchedulerStep) if tick.scheduler == scheduler]
            if not _ticks_in_windows(training, scheduler) or _is_made_for_micro_batches(case, training, ticks[0]):
                continue
            first, last = ticks[0], ticks[-1]
            updates = len(training.windows)
            ahead = ""
            if first.horizon:
                ahead = f" A schedule of {first.horizon} ticks ends after {first.horizon // training.usual} updates."
            yield Observation(
                first.place,
                f"{first.name} advances in every micro-batch: {len(ticks)} ticks in {updates} updates, "
                f"{training.usual} times as fast as the updates it schedules. The learning rate went from "
                f"{first.before:.3g} to {last.after:.3g}.{ahead}",
                "Call `scheduler.step()` right after `optimizer.step()`, under the same `if`.",
            )


def _ticks_in_windows(training: OptimizerHistory, scheduler: int) -> bool:
    """Whether in most windows there are as many ticks as micro-batches (the first may have one less)."""
    like = 0
    for index, window in enumerate(training.accumulating):
        count = sum(tick.scheduler == scheduler for tick in training.around(window, SchedulerStep))
        like += count > 1 and count in (len(window), len(window) - (index == 0))
    return 2 * like > len(training.accumulating)


def _is_made_for_micro_batches(case: RunRecord, training: OptimizerHistory, tick: SchedulerStep) -> bool:
    """Whether the schedule is as long as a whole number of epochs in micro-batches: then it was meant so."""
    loaders = {one.loader for window in training.windows for one in window.micro_batches}
    lengths = {one.length for one in case.events(EpochStart) if one.loader in loaders and one.length}
    return tick.horizon is not None and any(tick.horizon % length == 0 for length in lengths)


RULE = Rule(
    code="GF008",
    name="scheduler ticks per micro-batch",
    severity=ERROR,
    what="`scheduler.step()` runs in every micro-batch, `optimizer.step()` in every n-th.",
    why="The schedule runs n times too fast: warm-up is over after a n-th of its updates, and the learning rate "
    "reaches its end when a n-th of the training is done.",
    detection="In most windows a scheduler made as many steps between two steps of its optimizer as there were "
    "micro-batches.",
    limits="A schedule whose `T_max` or `total_steps` is a multiple of the loader's length was made for micro-batches, "
    "and is left alone. Learning rates written into `param_groups` by hand are not seen.",
    wrong="""(criterion(model(x), y) / 4).backward()
if (i + 1) % 4 == 0:
    optimizer.step()
    optimizer.zero_grad()
scheduler.step()
""",
    right="""(criterion(model(x), y) / 4).backward()
if (i + 1) % 4 == 0:
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
""",
    check=_check,
)
