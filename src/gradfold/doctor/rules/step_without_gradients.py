"""GF015: step without new gradients, or parameters without an optimizer (error).

`optimizer.step()` runs where all gradients are zero or None, or a second time with the same ones; or parameters get
gradients and are in no optimizer.

Why: The first learns nothing. The second makes an update twice. The third leaves part of the model at its
initialization (a head that was replaced after the optimizer was created), at the full cost of its gradients.
Detection: When a step begins, its gradients are compared with the backward passes they come from. Parameters without an
optimizer are found in the graphs of losses; they count if nothing changed them while the script ran.
Limits: Single steps without gradients, such as one after the loop, do nothing and are not reported; nor are steps with
a closure. Inputs with gradients are not parameters.

Fix:
  loss.backward()
+ optimizer.step()
  optimizer.zero_grad()
- optimizer.step()
"""

from __future__ import annotations

from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rule import Violation, Violations


def check(record: RunRecord) -> Violations:
    for history in record.optimizers:
        violation = _empty(history) or _stale(history)
        if violation is not None:
            yield violation
    if any(one.windows for one in record.optimizers):
        yield from _missing(record)


def _empty(history: OptimizerHistory) -> Violation | None:
    steps = [one.step for one in history.windows]
    empty = [one for one in steps if one.gradients in ("none", "zero")]
    if len(empty) < 2 or len(empty) < len(steps):
        return None
    kind = "no parameter has a gradient" if empty[0].gradients == "none" else "all gradients are zero"
    return Violation(
        empty[0].location,
        f"{history.optimizer}.step() ran {len(steps)} times, and each time {kind}: nothing is learned.",
        "Call `loss.backward()`, `optimizer.step()`, `optimizer.zero_grad()` in this order, with the parameters of the "
        "trained model in the optimizer.",
    )


def _stale(history: OptimizerHistory) -> Violation | None:
    stale = [one.step for one in history.windows if one.step.gradients == "stale"]
    if not stale:
        return None
    return Violation(
        stale[0].location,
        f"this step has no new gradients: {len(stale)} of {len(history.windows)} steps used those of the step before "
        "a second time, which doubles that update (and moves momentum and Adam's moments twice).",
        "Step once per window, and zero right after it.",
    )


def _missing(record: RunRecord) -> Violations:
    missing, names = record.missing, record.missing_names
    if not missing:
        return
    num_elements, num_backwards = sum(one.numel() for one in missing), max(map(len, missing.values()))
    named = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    what = f"{len(names)} parameters ({named})" if names else f"{num_elements:,} weights"
    yield Violation(
        record.log.backwards[min(some[0] for some in missing.values())].location,
        f"{what} get gradients here and are in no optimizer: {num_elements:,} weights keep their initial "
        f"values, and their gradients were computed for nothing ({num_backwards} backward passes).",
        "Pass them to the optimizer (create it after the last change to the model), or freeze them: "
        "`parameter.requires_grad_(False)`.",
        "likely",
    )
