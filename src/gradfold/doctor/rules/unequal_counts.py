"""GF007: means over unequal numbers of targets are averaged as if they were equal."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.finding import ERROR, Observation
from gradfold.doctor.history import RunRecord, UpdateWindow
from gradfold.doctor.rules.division import Mean, counted_by_hand, means_of
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []

_LEAST = 0.02  # weight error that is worth a word


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.accumulating:
        errors = [(error, window, means) for window in training.accumulating for error, means in _errors(window)]
        if len(errors) * 2 < len(training.accumulating) or not errors:
            continue
        worst, window, means = max(errors, key=lambda one: one[0])
        if worst < _LEAST:
            continue
        counts = [round(mean.count) for mean in means]
        fewest, most = min(counts), max(counts)
        yield Observation(
            window.micro_batches[0].place,
            f"the loss of each micro-batch is a mean over its own valid targets, and they are not equally many: in one "
            f"window {', '.join(map(str, counts[:8]))}{', ...' * (len(counts) > 8)}. A target among {fewest} weighs "
            f"{most / max(fewest, 1):.3g} times as much as one among {most}; weights are up to {worst:.0%} off those "
            "of the whole batch.",
            "Count the window's targets first, sum the losses, and divide by that count: `F.cross_entropy(..., "
            'reduction="sum") / num_targets`; or '
            'gradfold.windows(loader, n, model=model, weight=token_count("labels")).',
        )


def _errors(window: UpdateWindow) -> Iterator[tuple[float, list[Mean]]]:
    """The largest relative error of a micro-batch's weight."""
    means = means_of(window) or counted_by_hand(window)
    if not means or window.step.is_rewritten or any(not mean.count for mean in means):
        return
    scales = [mean.scale for mean in means]
    if max(scales) - min(scales) > 1e-4 * max(map(abs, scales)):
        return  # weighed by something, it may be right
    if len({mean.count for mean in means}) == 1:
        return
    total = sum(mean.count for mean in means)
    yield max(abs(total / (len(means) * mean.count) - 1) for mean in means), means


RULE = Rule(
    code="GF007",
    name="mean of means over unequal token counts",
    severity=ERROR,
    what="Each micro-batch's loss is a mean over its own valid targets (tokens that are not padding, pixels that are "
    "not void, rows of a short last batch), and the means count equally.",
    why="Targets in micro-batches with few of them weigh more than others: the gradient is not that of the whole "
    "batch, and short sequences are learned at the cost of long ones. It is what was wrong in most trainers until "
    "2024.",
    detection="The number of valid targets is read from the loss's graph (`cross_entropy`, `nll_loss`, or a sum "
    "divided by a count), differs within most windows, and the losses were scaled alike. The largest error of a weight "
    "is measured; below 2 % nothing is said.",
    limits="A last batch with fewer rows is left alone where it is in one of many windows. So are losses with class "
    "weights.",
    wrong="""loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
(loss / 4).backward()
""",
    right="""num_targets = sum((labels != -100).sum() for _, labels in window)  # before the first backward
for tokens, labels in window:
    loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
    (loss / num_targets).backward()
""",
    check=_check,
)
