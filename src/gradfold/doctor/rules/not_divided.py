"""GF002: means over micro-batches are added up and never divided by their number."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.events import Clip
from gradfold.doctor.finding import ERROR, Observation
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rules.division import is_close, means_of
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []

_ADAPTIVE = ("Adam", "Adafactor", "RMSprop", "Adagrad", "Adadelta", "Lion", "LAMB", "Muon", "Rprop")


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.accumulating:
        undivided = []
        for window in training.full:
            means = means_of(window)
            if means and all(is_close(abs(mean.scale), 1.0) for mean in means):
                undivided.append(window)
        if undivided and 2 * len(undivided) > len(training.full):
            n = training.usual
            yield Observation(
                undivided[0].micro_batches[0].place,
                f"the loss is a mean over a micro-batch, and {n} of them are added up without division: the gradient "
                f"is {n} times too large. {_effect(training, n)}{_clipping(case, training, n)}",
                f"`(loss / {n}).backward()`, or `loss / len(window)` where the last window is shorter.",
            )


def _effect(training: OptimizerHistory, n: int) -> str:
    if any(name.lower() in training.optimizer.lower() for name in _ADAPTIVE):
        return (
            f"{training.optimizer} divides by the gradient's size, so that updates stay nearly as large; its eps and "
            f"any decay that is coupled to the gradient count {n} times less."
        )
    return f"For {training.optimizer} that is a learning rate {n} times as large as the one set."


def _clipping(case: RunRecord, training: OptimizerHistory, n: int) -> str:
    clips = [one for one in case.events(Clip) if training.ledger in one.entries and one.kind == "norm"]
    norms = [(float(one.norm), one.limit) for one in clips if one.norm is not None]
    if not norms:
        return ""
    cut = sum(norm > limit for norm, limit in norms)
    right = sum(norm / n > limit for norm, limit in norms)
    return f" clip_grad_norm_ cut {cut} of {len(norms)} gradients; of divided ones it would have cut {right}."


RULE = Rule(
    code="GF002",
    name="loss not divided by the number of micro-batches",
    severity=ERROR,
    what="`loss.backward()` runs n times per step with a loss that is a mean over its micro-batch.",
    why="The sum of n means is n times the mean: the gradient is n times too large. For SGD that is a learning rate n "
    "times as large; Adam hides it, but for eps and coupled weight decay; clipping cuts n times as often, and logged "
    "gradient norms are n times too large.",
    detection="In most full windows every loss is a mean (its autograd graph says so), stands undivided, its backward "
    "pass has no seed below 1, and gradients were not divided by hand before the step.",
    limits='Sums (`reduction="sum"`) are left alone: there is no number they must be divided by. So are losses whose '
    "graph does not tell, such as compiled ones, losses with a weight other than 1 in front, and several losses of "
    "one batch.",
    wrong="""for i, (x, y) in enumerate(loader):
    criterion(model(x), y).backward()
    if (i + 1) % 4 == 0:
        optimizer.step()
        optimizer.zero_grad()
""",
    right="""for i, (x, y) in enumerate(loader):
    (criterion(model(x), y) / 4).backward()
    if (i + 1) % 4 == 0:
        optimizer.step()
        optimizer.zero_grad()
""",
    check=_check,
)
