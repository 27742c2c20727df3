"""GF010: scaler misuse (error).

`unscale_` or `update` of a GradScaler runs inside a window, `step` runs without `update`, or `optimizer.step()` runs
directly after a scaled loss.

Why: The scale belongs to a whole window. Once gradients of different scales are summed they cannot be separated;
without `update` the scale never recovers from an overflow; a plain step uses scaled gradients.
Detection: Calls of the scaler are put in order with backward passes and steps. A disabled scaler does nothing.
Limits: Hand-written scaling is not seen.

Fix:
  scaler.scale(loss / 4).backward()
- scaler.unscale_(optimizer)
  if (i + 1) % 4 == 0:
+     scaler.unscale_(optimizer)
+     torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      scaler.step(optimizer)
      scaler.update()
      optimizer.zero_grad()
"""

from __future__ import annotations

from gradfold.doctor.events import ScalerCall
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rule import Violation, Violations

_ORDER = (
    "Per window: `scaler.scale(loss).backward()` n times, then once `scaler.unscale_(optimizer)` (if you clip), "
    "`scaler.step(optimizer)`, `scaler.update()`."
)
# What torch raises, and its meaning; by the call where several calls raise the same.
_RAISED = ("already been called", "No inf checks", "is being called after step", "_scale is None")
_MEANINGS = {
    "update": "`scaler.update()` runs where no step or unscaling has checked for infinities: torch raises here.",
    "step": "`scaler.step()` runs a second time without `scaler.update()` in between: torch raises here.",
    "unscale_": "`scaler.unscale_()` runs a second time before `scaler.update()`: torch raises here, in the second "
    "micro-batch.",
}
_EFFECTS = {
    "update": "if it changes the scale, gradients of different scales are summed, and its count of good updates runs "
    "too fast",
    "unscale_": "what follows is scaled again, and the sum mixes scaled and unscaled gradients",
}


def check(record: RunRecord) -> Violations:
    for call in record.log.of(ScalerCall):
        if any(text in call.error for text in _RAISED):
            no_scale = f"`scaler.{call.call}()` runs though no loss was scaled: torch raises here."
            yield Violation(call.location, no_scale if "_scale is None" in call.error else _MEANINGS[call.call], _ORDER)
            return
    for history in record.optimizers:
        yield from _inside(history)
        yield from _never_updated(history)
        yield from _plain_step(history)


def _inside(history: OptimizerHistory) -> Violations:
    for window in history.windows:
        num_backwards = len(window.backwards)
        if num_backwards < 2 or window.is_by_gradfold:
            continue
        for call in history.inside(window, ScalerCall):
            if call.call in _EFFECTS and call.backwards.get(history.number):
                yield Violation(
                    call.location,
                    f"`scaler.{call.call}()` runs inside a window of {num_backwards} backward passes: "
                    f"{_EFFECTS[call.call]}.",
                    _ORDER,
                )
                return


def _never_updated(history: OptimizerHistory) -> Violations:
    calls = history.log.of(ScalerCall)
    steps = [one for one in calls if one.call == "step" and history.number in one.backwards]
    if len(steps) < 2 or any(one.call == "update" and one.scaler == steps[0].scaler for one in calls):
        return
    yield Violation(
        steps[0].location,
        f"`scaler.step()` ran {len(steps)} times and `scaler.update()` never: the loss scale keeps its initial value, "
        "whether gradients overflow or vanish.",
        _ORDER,
    )


def _plain_step(history: OptimizerHistory) -> Violations:
    for window in history.windows:
        step = window.step
        if step.through_scaler or step.is_rewritten or step.ratio != 1 or step.has_closure:
            continue
        calls = history.around(window, ScalerCall)
        is_unscaled = any(one.call == "unscale_" and history.number in one.backwards for one in calls)
        if not is_unscaled and any(one.is_scaled for one in window.backwards):
            yield Violation(
                step.location,
                "the loss was scaled by a GradScaler, but the optimizer's own step uses the scaled gradients: they are "
                "too large by the scale (65,536 at first, unless `init_scale` says otherwise), and an overflow is not "
                "noticed.",
                "`scaler.step(optimizer)` and `scaler.update()` instead of `optimizer.step()`.",
            )
            return
