"""GF010: a GradScaler is driven out of order."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.events import Scaler
from gradfold.doctor.finding import ERROR, Observation
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []

_ORDER = "Per window: `scaler.scale(loss).backward()` n times, then once `scaler.unscale_(optimizer)` (if you clip), "
_ORDER += "`scaler.step(optimizer)`, `scaler.update()`."
_RAISED = ("already been called", "No inf checks", "is being called after step", "_scale is None")


def _check(case: RunRecord) -> Iterator[Observation]:
    for call in case.events(Scaler):
        if any(text in call.error for text in _RAISED):
            yield Observation(call.place, _meaning(call), _ORDER)
            return
    for training in case.trainings:
        yield from _inside(training)
        yield from _never_updated(case, training)
        yield from _plain_step(training)


def _meaning(call: Scaler) -> str:
    if "_scale is None" in call.error:
        return f"`scaler.{call.call}()` runs though no loss was scaled: torch raises here."
    if call.call == "update":
        return "`scaler.update()` runs where no step or unscaling has looked for infinities: torch raises here."
    if call.call == "step":
        return "`scaler.step()` runs a second time without `scaler.update()` in between: torch raises here."
    return (
        "`scaler.unscale_()` runs a second time before `scaler.update()`: torch raises here, in the second micro-batch."
    )


def _inside(training: OptimizerHistory) -> Iterator[Observation]:
    for window in training.windows:
        if len(window.backwards) < 2 or window.is_by_gradfold:
            continue
        for call in training.inside(window, Scaler):
            if training.ledger not in call.entries or not call.entries[training.ledger] or call.call == "step":
                continue
            effect = (
                "what follows is scaled again, and the sum mixes scaled and unscaled gradients"
                if call.call == "unscale_"
                else "if it changes the scale, gradients of different scales are added up, and its count of good "
                "updates runs too fast"
            )
            yield Observation(
                call.place,
                f"`scaler.{call.call}()` runs inside a window of {len(window.backwards)} backward passes: {effect}.",
                _ORDER,
            )
            return


def _never_updated(case: RunRecord, training: OptimizerHistory) -> Iterator[Observation]:
    calls = case.events(Scaler)
    steps = [one for one in calls if one.call == "step" and training.ledger in one.entries]
    if len(steps) < 2 or any(one.call == "update" and one.scaler == steps[0].scaler for one in calls):
        return
    yield Observation(
        steps[0].place,
        f"`scaler.step()` ran {len(steps)} times and `scaler.update()` never: the loss scale stays as it began, "
        "whether gradients overflow or vanish.",
        _ORDER,
    )


def _plain_step(training: OptimizerHistory) -> Iterator[Observation]:
    for window in training.windows:
        step = window.step
        scaled = [one for one in window.backwards if one.is_scaled]
        if not scaled or step.through_scaler or step.is_rewritten or step.ratio != 1 or step.has_closure:
            continue
        if any(one.call == "unscale_" and training.ledger in one.entries for one in training.around(window, Scaler)):
            continue
        yield Observation(
            step.place,
            "the loss was scaled by a GradScaler, but the step is the optimizer's own: it uses gradients as many times "
            "too large as the scale is (65,536 at first, unless `init_scale` says otherwise), and an overflow is not "
            "noticed.",
            "`scaler.step(optimizer)` and `scaler.update()` instead of `optimizer.step()`.",
        )
        return


RULE = Rule(
    code="GF010",
    name="scaler misuse",
    severity=ERROR,
    what="`unscale_` or `update` of a GradScaler runs inside a window, `step` runs without `update`, or the optimizer "
    "steps by itself after a scaled loss.",
    why="The scale belongs to a whole window. Once gradients of different scales are added up nothing can take them "
    "apart; without `update` the scale never recovers from an overflow; a plain step uses scaled gradients.",
    detection="Calls of the scaler are put in order with backward passes and steps. A disabled scaler does nothing.",
    limits="Scaling written by hand is not seen.",
    wrong="""scaler.scale(loss / 4).backward()
scaler.unscale_(optimizer)
if (i + 1) % 4 == 0:
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
""",
    right="""scaler.scale(loss / 4).backward()
if (i + 1) % 4 == 0:
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
""",
    check=_check,
)
