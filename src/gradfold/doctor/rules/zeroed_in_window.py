"""GF001: gradients are zeroed inside a window, so that only its last micro-batch reaches the update."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from gradfold.doctor.events import ZeroGrad
from gradfold.doctor.finding import ERROR, Observation
from gradfold.doctor.history import OptimizerHistory, RunRecord, pass_of
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []


def lost_in_windows(training: OptimizerHistory) -> list[ZeroGrad]:
    """The zeroings inside windows, where most windows have one; else none.

    Inside a window: what is lost comes from a line that updates the model at other times, from the same pass over the
    data as the step that follows.
    """
    found: dict[int, list[ZeroGrad]] = {}
    for clear in training.clears:
        window = next((index for index, one in enumerate(training.windows) if one.step.at > clear.at), None)
        if window is None or clear.is_used or training.windows[window].step.is_rewritten:
            continue
        if not training.windows[window].backwards:
            continue
        lost, kept = training.backward(clear.entries[-1]), training.windows[window].backwards[-1]
        if lost.path in training.lines and pass_of(lost) == pass_of(kept):
            found.setdefault(window, []).append(clear)
    clears = [clear for some in found.values() for clear in some]
    return clears if len(clears) > 1 and 2 * len(found) > len(training.windows) else []


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.trainings:
        clears = lost_in_windows(training)
        if not clears:
            continue
        place = Counter(clear.place for clear in clears).most_common(1)[0][0]
        lost = sum(len(clear.entries) for clear in clears)
        kept = sum(len(window.backwards) for window in training.windows)
        rows = max((one.rows for window in training.windows for one in window.backwards), default=0)
        batch = f": an update is made from {rows} rows, not from {rows * (lost + kept) // max(kept, 1)}" * (rows > 0)
        yield Observation(
            place,
            f"gradients are zeroed here before {training.optimizer}.step() has used them: of {lost + kept} "
            f"micro-batches only {kept} reached an update{batch}. Nothing accumulates; the others were computed for "
            "nothing.",
            "Zero right after the step and nowhere else: `if (i + 1) % n == 0: optimizer.step(); "
            "optimizer.zero_grad()`.",
        )


RULE = Rule(
    code="GF001",
    name="gradients zeroed inside a window",
    severity=ERROR,
    what="`zero_grad()` (or `p.grad = None`, `p.grad.zero_()`) runs in every micro-batch, the step in every n-th.",
    why="Only the last micro-batch of a window is left in `.grad` when the step comes. The batch is n times smaller "
    "than it looks, the noise larger, and (n - 1) / n of the computation is thrown away. Where the loss is divided by "
    "n, the gradient is n times too small besides.",
    detection="In most windows, gradients that no step, no closure and no change of the parameters by hand has used go "
    "to zero or None, in the same pass over the data as the step that follows, and they come from a line whose "
    "gradients reach a step at other times.",
    limits="Gradients that are copied elsewhere before they are zeroed (buffers of one's own) are not counted as lost "
    "where `.grad` is written by hand before the step. Gradients of other losses, such as those that a generator's "
    "loss leaves in the discriminator, may be zeroed at any time.",
    wrong="""for i, (x, y) in enumerate(loader):
    optimizer.zero_grad()
    (criterion(model(x), y) / 4).backward()
    if (i + 1) % 4 == 0:
        optimizer.step()
""",
    right="""for i, (x, y) in enumerate(loader):
    (criterion(model(x), y) / 4).backward()
    if (i + 1) % 4 == 0:
        optimizer.step()
        optimizer.zero_grad()
""",
    check=_check,
)
