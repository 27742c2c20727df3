"""GF015: a step has no new gradients, or the optimizer misses parameters that get some."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.finding import ERROR, LIKELY, Observation
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.trainings:
        observation = _empty(training) or _stale(training)
        if observation is not None:
            yield observation
    yield from _missed(case)


def _empty(training: OptimizerHistory) -> Observation | None:
    steps = [one.step for one in training.windows]
    empty = [one for one in steps if one.gradients in ("none", "zero")]
    if len(empty) < 2 or len(empty) < len(steps):
        return None
    kind = "no parameter has a gradient" if empty[0].gradients == "none" else "all gradients are zero"
    return Observation(
        empty[0].place,
        f"{training.optimizer}.step() ran {len(steps)} times, and each time {kind}: nothing is learned.",
        "The order is `loss.backward()`, `optimizer.step()`, `optimizer.zero_grad()`; and the optimizer must have the "
        "parameters of the model that is trained.",
    )


def _stale(training: OptimizerHistory) -> Observation | None:
    stale = [one.step for one in training.windows if one.step.gradients == "stale"]
    if not stale:
        return None
    return Observation(
        stale[0].place,
        f"this step has no new gradients: {len(stale)} of {len(training.windows)} steps used those of the step before "
        "a second time, which doubles that update (and moves momentum and Adam's moments twice).",
        "Step once per window, and zero right after it.",
    )


def _missed(case: RunRecord) -> Iterator[Observation]:
    stray = case.stray
    if stray is None or not any(one.windows for one in case.trainings):
        return
    named = ", ".join(stray.names[:3]) + ", ..." * (len(stray.names) > 3)
    what = f"{len(stray.names)} parameters ({named})" if stray.names else f"{stray.num_elements:,} numbers"
    place = case.tape.backwards[stray.first].place
    yield Observation(
        place,
        f"{what} get gradients here and are in no optimizer: {stray.num_elements:,} weights stay as they began, and "
        f"their gradients were computed for nothing ({stray.num_backwards} backward passes).",
        "Give them to the optimizer (make it after the last change to the model), or freeze them: "
        "`parameter.requires_grad_(False)`.",
        LIKELY,
    )


RULE = Rule(
    code="GF015",
    name="step without new gradients, or parameters without an optimizer",
    severity=ERROR,
    what="`optimizer.step()` runs where all gradients are zero or None, or a second time with the same ones; or "
    "parameters get gradients and no optimizer has them.",
    why="The first learns nothing. The second makes an update twice. The third leaves part of the model as it was "
    "initialized (a head that was replaced after the optimizer was made), at the full cost of its gradients.",
    detection="Gradients are looked at when a step begins, with the backward passes they come from. Parameters without "
    "an optimizer are found in the graphs of losses; they count if nothing changed them while the script ran.",
    limits="Single steps without gradients, such as one after the loop, do nothing and are left alone, and so are "
    "steps with a closure. Gradients of inputs are no parameters'.",
    wrong="""loss.backward()
optimizer.zero_grad()
optimizer.step()
""",
    right="""loss.backward()
optimizer.step()
optimizer.zero_grad()
""",
    check=_check,
)
