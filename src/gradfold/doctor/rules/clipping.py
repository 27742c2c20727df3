"""GF009: clipping per micro-batch, or before unscaling (error).

`clip_grad_norm_` or `clip_grad_value_` runs after every backward pass of a window, or between
`scaler.scale(loss).backward()` and `scaler.step(optimizer)` without `scaler.unscale_`.

Why: Clipping is not linear: clipping partial sums yields neither the clipped gradient of the whole batch nor the mean
of clipped ones. Scaled gradients are 65,536 times as large at first, so clipping removes nearly all.
Detection: In most windows a call to clip comes before the last backward pass; or one comes while the gradients are
those of a scaled loss, and `scaler.step` follows.
Limits: A limit of 1e9 or more only measures the norm, and is not reported. Hand-written clipping is not seen.

Fix:
  (criterion(model(x), y) / 4).backward()
- torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
  if (i + 1) % 4 == 0:
+     torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
      optimizer.step()
      optimizer.zero_grad()
"""

from __future__ import annotations

from gradfold.doctor.events import Clip, ScalerCall
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rule import Violation, Violations

_NO_LIMIT = 1e9  # clip_grad_norm_ with such a limit only measures


def check(record: RunRecord) -> Violations:
    for history in record.optimizers:
        if history.accumulates:
            yield from _inside(history)
        yield from _scaled(history)


def _clips(history: OptimizerHistory, some: list[Clip]) -> list[Clip]:
    return [one for one in some if history.number in one.backwards and one.limit < _NO_LIMIT]


def _inside(history: OptimizerHistory) -> Violations:
    windows = [clips for one in history.accumulating if (clips := _clips(history, history.inside(one, Clip)))]
    if not windows or 2 * len(windows) <= len(history.accumulating):
        return
    clips = [clip for some in windows for clip in some]
    num_clipped = sum(clip.norm is not None and float(clip.norm) > clip.limit for clip in clips)
    norms = f" It reduced {num_clipped} of {len(clips)} partial sums." if clips[0].kind == "norm" else ""
    yield Violation(
        clips[0].location,
        f"gradients are clipped in every micro-batch, while the window's sum is incomplete.{norms} The first "
        "micro-batches are clipped again with each that follows; the update is not the clipped gradient of the whole "
        "batch.",
        "Clip once, after the window's last backward and right before `optimizer.step()`.",
    )


def _scaled(history: OptimizerHistory) -> Violations:
    for clip in _clips(history, history.log.of(Clip)):
        if history.number not in clip.scaled:
            continue
        later = [one for one in history.log.of(ScalerCall) if one.at > clip.at and history.number in one.backwards]
        if later and later[0].call in ("step", "unscale_"):
            norm = "" if clip.norm is None else f" (the norm was {float(clip.norm):.3g})"
            yield Violation(
                clip.location,
                f"gradients are clipped to {clip.limit:g} while they still carry the loss scale{norm}: after "
                "unscaling, their norm is a tiny fraction of the limit, and training hardly moves.",
                "Call `scaler.unscale_(optimizer)` before clipping.",
            )
            return
