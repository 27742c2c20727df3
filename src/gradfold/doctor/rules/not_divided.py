"""GF002: loss not divided by the number of micro-batches (error).

`loss.backward()` runs n times per step with a loss that is a mean over its micro-batch.

Why: The sum of n means is n times the mean: the gradient is n times too large. For SGD this equals a learning rate n
times as large; Adam hides it, except for eps and coupled weight decay; gradients are clipped more often, and logged
gradient norms are n times too large.
Detection: In most full windows every loss is a mean (its autograd graph says so) and is not divided, no gradient below
1 is passed to `backward`, and gradients were not divided by hand before the step.
Limits: Sums (`reduction="sum"`) are not reported: there is no number they must be divided by. Nor are losses whose
graph does not tell, such as compiled ones, losses with a weight other than 1, and several losses of one batch.

Fix:
  for i, (x, y) in enumerate(loader):
-     criterion(model(x), y).backward()
+     (criterion(model(x), y) / 4).backward()
      if (i + 1) % 4 == 0:
          optimizer.step()
          optimizer.zero_grad()
"""

from __future__ import annotations

from gradfold.doctor.division import is_divided_by
from gradfold.doctor.events import Clip
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rule import Violation, Violations

_ADAPTIVE = ("Adam", "Adafactor", "RMSprop", "Adagrad", "Adadelta", "Lion", "LAMB", "Muon", "Rprop")


def check(record: RunRecord) -> Violations:
    for history in record.accumulating:
        undivided = [window for window in history.full if is_divided_by(window, 1)]
        if undivided and 2 * len(undivided) > len(history.full):
            n = history.window_length
            yield Violation(
                undivided[0].micro_batches[0].location,
                f"the loss is a mean over a micro-batch, and {n} of them are summed without division: the gradient is "
                f"{n} times too large. {_effect(history, n)}{_clipping(history, n)}",
                f"`(loss / {n}).backward()`, or `loss / len(window)` where the last window is shorter.",
            )


def _effect(history: OptimizerHistory, n: int) -> str:
    if any(name.lower() in history.optimizer.lower() for name in _ADAPTIVE):
        return (
            f"{history.optimizer} divides by the gradient's size, so updates stay nearly as large; its eps and any "
            f"decay that is coupled to the gradient weigh {n} times less."
        )
    return f"For {history.optimizer} this equals a learning rate {n} times as large as the one set."


def _clipping(history: OptimizerHistory, n: int) -> str:
    clips = [one for one in history.log.of(Clip) if history.number in one.backwards and one.kind == "norm"]
    norms = [(float(one.norm), one.limit) for one in clips if one.norm is not None]
    if not norms:
        return ""
    num_clipped = sum(norm > limit for norm, limit in norms)
    divided = sum(norm / n > limit for norm, limit in norms)
    return f" clip_grad_norm_ clipped {num_clipped} of {len(norms)} gradients; divided by {n}, it would clip {divided}."
