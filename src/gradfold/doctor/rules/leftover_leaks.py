"""GF005: gradients that an epoch or a run left over are added to the next one's first window."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.finding import ERROR, Observation
from gradfold.doctor.history import OptimizerHistory, RunRecord, UpdateWindow, pass_of
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []


def leaking(training: OptimizerHistory) -> list[UpdateWindow]:
    """The windows that begin with what another pass over the data left over, and so are too long."""
    windows = [one for one in training.windows if not one.num_stale and not one.is_by_gradfold]
    return [one for one in windows if one.crosses_passes and len(one) > training.usual]


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.trainings:
        observation = _never_zeroed(training) or _between_passes(training) or _before_training(training)
        if observation is not None:
            yield observation


def _never_zeroed(training: OptimizerHistory) -> Observation | None:
    stale = [one for one in training.windows if one.num_stale and one.backwards]
    if any(one.step.is_rewritten or one.step.ratio != 1 for one in stale) or 2 * len(stale) < len(training.windows):
        return None
    if not stale:
        return None
    last = stale[-1]
    return Observation(
        last.step.place,
        f"gradients are not zeroed between updates: update {len(training.windows)} of this step still contained those "
        f"of {last.num_stale} backward passes that earlier steps had used, beside {len(last.backwards)} new. Updates "
        "point at the sum of all gradients so far.",
        "Call `optimizer.zero_grad()` right after `optimizer.step()`.",
    )


def _between_passes(training: OptimizerHistory) -> Observation | None:
    leaks = leaking(training)
    if not leaks or training.usual < 1:
        return None
    window = leaks[0]
    old = sum(pass_of(one) != pass_of(window.micro_batches[-1]) for one in window.micro_batches)
    factor = len(window) / training.usual
    return Observation(
        window.step.place,
        f"gradients of {old} micro-batch{'es' * (old > 1)} that the epoch before left over are in the first update of "
        f"the next: it adds up {len(window)} micro-batches where the others have {training.usual}, and is {factor:.3g} "
        "times too large, in part computed with older weights.",
        "Step at the end of an epoch for what is left, divided by its own length, or count micro-batches across "
        "epochs.",
    )


def _before_training(training: OptimizerHistory) -> Observation | None:
    if len(training.windows) < 2:
        return None
    first, *others = training.windows
    usual = {one.path for window in others for one in window.backwards}
    extra = [one for one in first.backwards if one.path not in usual]
    main = [one for one in first.backwards if one.path in usual]
    if not extra or not main or extra[-1].index > main[0].index or extra[-1].fetches or not main[0].fetches:
        return None
    return Observation(
        extra[-1].place,
        "the gradient of this backward pass, before training, is still in `.grad` when the first update is made: it "
        f"has {len(first.backwards)} gradients where the others have {len(others[0].backwards)}.",
        "Call `model.zero_grad()` after a trial run, before training begins.",
    )


RULE = Rule(
    code="GF005",
    name="leftover gradients leak into the next epoch or run",
    severity=ERROR,
    what="Gradients that no step has used, or that one has used already, stand in `.grad` when a new epoch, run or "
    "window begins, and are added to it.",
    why="That update is too large by the share of what is left over, and part of it was computed with older weights or "
    "for another purpose. Without any zeroing, every update points at the sum of all gradients so far.",
    detection="A window has more micro-batches than usual and they come from two passes over the data; or it contains "
    "backward passes that a step has used; or those of a line that runs once, before the first batch is fetched.",
    limits="A counter that runs on across epochs, so that every window has its full length, is no leak. Gradients that "
    "are scaled by hand between updates (a momentum of one's own) are left alone.",
    wrong="""for epoch in range(3):
    for i, (x, y) in enumerate(loader):  # 10 batches: 4, 4, and 2 left over
        (criterion(model(x), y) / 4).backward()
        if (i + 1) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
""",
    right="""for epoch in range(3):
    for i, (x, y) in enumerate(loader):
        length = min(4, len(loader) - i // 4 * 4)
        (criterion(model(x), y) / length).backward()
        if (i + 1) % 4 == 0 or i + 1 == len(loader):
            optimizer.step()
            optimizer.zero_grad()
""",
    check=_check,
)
