"""GF007: mean of means over unequal token counts (error).

Each micro-batch's loss is a mean over its own valid targets (tokens that are not padding, pixels that are not void,
rows of a short last batch), and the means count equally.

Why: Targets in micro-batches with few of them weigh more than others: the gradient is not that of the whole batch, and
short sequences are learned at the cost of long ones. Most trainers had this bug until 2024.
Detection: The number of valid targets is read from the loss's graph (`cross_entropy`, `nll_loss`, or a sum divided by a
count), differs within most windows, and the losses were scaled alike. The largest error of a weight is measured; below
2 % it is not reported.
Limits: A last batch with fewer rows is not reported where it is in one of many windows, nor are losses with class
weights.

Fix:
- loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
- (loss / 4).backward()
+ num_targets = sum((labels != -100).sum() for _, labels in window)  # before the first backward
+ for tokens, labels in window:
+     loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
+     (loss / num_targets).backward()
"""

from __future__ import annotations

from gradfold.doctor.division import means_by_varying_count, means_of
from gradfold.doctor.history import RunRecord, UpdateWindow
from gradfold.doctor.rule import Violation, Violations

_LEAST = 0.02  # error of a weight that is worth reporting


def check(record: RunRecord) -> Violations:
    for history in record.accumulating:
        counted = [(window, counts) for window in history.accumulating if (counts := _unequal_counts(window))]
        if not counted or len(counted) * 2 < len(history.accumulating):
            continue
        window, exact = max(counted, key=lambda one: _error(one[1]))
        if _error(exact) < _LEAST:
            continue
        counts = [round(count) for count in exact]
        fewest, most = min(counts), max(counts)
        yield Violation(
            window.micro_batches[0].location,
            f"the loss of each micro-batch is a mean over its own valid targets, and their numbers differ: in one "
            f"window {', '.join(map(str, counts[:8]))}{', ...' * (len(counts) > 8)}. A target among {fewest} weighs "
            f"{most / max(fewest, 1):.3g} times as much as one among {most}; weights are up to {_error(exact):.0%} off "
            "those of the whole batch.",
            "Count the window's targets first, sum the losses, and divide by that count: `F.cross_entropy(..., "
            'reduction="sum") / num_targets`; or '
            'gradfold.windows(loader, n, model=model, weight=token_count("labels")).',
        )


def _unequal_counts(window: UpdateWindow) -> list[float]:
    """The number of targets of each micro-batch; empty where all are equal, or unknown, or the losses are weighted."""
    means = means_of(window) or means_by_varying_count(window)
    if not means or window.step.is_rewritten or any(not mean.count for mean in means):
        return []
    scales = [mean.scale for mean in means]
    if max(scales) - min(scales) > 1e-4 * max(map(abs, scales)):
        return []  # weighted by something, perhaps rightly
    counts = [mean.count for mean in means]
    return counts if len(set(counts)) > 1 else []


def _error(counts: list[float]) -> float:
    """The largest relative error of a micro-batch's weight."""
    return max(abs(sum(counts) / (len(counts) * count) - 1) for count in counts)
