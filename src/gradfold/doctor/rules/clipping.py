"""GF009: gradients are clipped in every micro-batch, or while they carry the loss scale."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.events import Clip, Scaler
from gradfold.doctor.finding import ERROR, Observation
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []

_NO_LIMIT = 1e9  # clip_grad_norm_ with such a limit only measures


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.trainings:
        observation = _inside(training) if training.accumulates else None
        if observation is not None:
            yield observation
        observation = _scaled(case, training)
        if observation is not None:
            yield observation


def _clips(training: OptimizerHistory, some: list[Clip]) -> list[Clip]:
    return [one for one in some if training.ledger in one.entries and one.limit < _NO_LIMIT]


def _inside(training: OptimizerHistory) -> Observation | None:
    windows = [(one, clips) for one in training.accumulating if (clips := _clips(training, training.inside(one, Clip)))]
    if not windows or 2 * len(windows) <= len(training.accumulating):
        return None
    clips = [clip for _, some in windows for clip in some]
    cut = sum(clip.norm is not None and float(clip.norm) > clip.limit for clip in clips)
    norms = f" It cut {cut} of {len(clips)} unfinished sums." if clips[0].kind == "norm" else ""
    return Observation(
        clips[0].place,
        f"gradients are clipped in every micro-batch, while the window's sum is still growing.{norms} The first "
        "micro-batches are clipped again and again with those that follow; the update is not the clipped gradient of "
        "the whole batch.",
        "Clip once, after the window's last backward and right before `optimizer.step()`.",
    )


def _scaled(case: RunRecord, training: OptimizerHistory) -> Observation | None:
    for clip in _clips(training, case.events(Clip)):
        if training.ledger not in clip.scaled:
            continue
        later = [one for one in case.events(Scaler) if one.at > clip.at and training.ledger in one.entries]
        if later and later[0].call in ("step", "unscale_"):
            norm = "" if clip.norm is None else f" (the norm it saw was {float(clip.norm):.3g})"
            return Observation(
                clip.place,
                f"gradients are clipped to {clip.limit:g} while they still carry the loss scale{norm}: what is left "
                "after unscaling is a tiny fraction of the limit, and training all but stands still.",
                "Call `scaler.unscale_(optimizer)` before clipping.",
            )
    return None


RULE = Rule(
    code="GF009",
    name="clipping per micro-batch, or before unscaling",
    severity=ERROR,
    what="`clip_grad_norm_` or `clip_grad_value_` runs after every backward pass of a window, or between "
    "`scaler.scale(loss).backward()` and `scaler.step(optimizer)` without `scaler.unscale_`.",
    why="Clipping is not linear: clipping unfinished sums gives neither the clipped gradient of the whole batch nor "
    "the mean of clipped ones. Scaled gradients are 65,536 times as large at first, so that clipping takes nearly all "
    "away.",
    detection="In most windows a call to clip comes before the last backward pass; or one comes while the gradients "
    "are those of a scaled loss, and `scaler.step` follows.",
    limits="A limit of 1e9 and more only measures the norm, and is left alone. Clipping written by hand is not seen.",
    wrong="""(criterion(model(x), y) / 4).backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
if (i + 1) % 4 == 0:
    optimizer.step()
    optimizer.zero_grad()
""",
    right="""(criterion(model(x), y) / 4).backward()
if (i + 1) % 4 == 0:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
""",
    check=_check,
)
