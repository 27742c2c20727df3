"""GF006: a window of fewer micro-batches is divided by the number that full ones have."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.finding import ERROR, Observation
from gradfold.doctor.history import RunRecord, UpdateWindow
from gradfold.doctor.rules.division import is_close, means_of
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.accumulating:
        n = training.usual
        if not any(_divided_by(window, n) for window in training.full):
            continue
        short = [one for one in training.windows if 0 < len(one) < n and not one.is_by_gradfold and _divided_by(one, n)]
        if not short:
            continue
        window, m = short[0], len(short[0])
        by = f" by {window.micro_batches[-1].place.through[-1]}" if window.micro_batches[-1].place.through else ""
        yield Observation(
            window.micro_batches[-1].place,
            f"a window of {m} micro-batch{'es' * (m > 1)} is divided by {n}{by}, the length of a full one: its "
            f"gradient is {m / n:.3g} of what it should be ({len(short)} of {len(training.windows)} updates seen).",
            f"Divide by the number that the window really has: `length = min({n}, len(loader) - i // {n} * {n})`, or "
            "let gradfold.windows(loader, n, model=model) measure it.",
        )


def _divided_by(window: UpdateWindow, n: int) -> bool:
    means = means_of(window)
    return means is not None and all(is_close(abs(mean.scale), 1 / n) for mean in means)


RULE = Rule(
    code="GF006",
    name="partial window divided by the full count",
    severity=ERROR,
    what="The last window of an epoch has m < n micro-batches and is stepped, with each loss divided by n.",
    why="Its gradient is m / n of what it should be: with 1 of 8 left, the update is an eighth. Accelerate and "
    "Lightning divide so, too.",
    detection="Full windows of n have losses scaled by 1 / n, and a shorter one that was stepped has the same scale.",
    limits="Losses whose graph does not tell their scale are left alone, and so are sums.",
    wrong="""(criterion(model(x), y) / 4).backward()
if (i + 1) % 4 == 0 or i + 1 == len(loader):
    optimizer.step()
    optimizer.zero_grad()
""",
    right="""length = min(4, len(loader) - i // 4 * 4)
(criterion(model(x), y) / length).backward()
if (i + 1) % 4 == 0 or i + 1 == len(loader):
    optimizer.step()
    optimizer.zero_grad()
""",
    check=_check,
)
