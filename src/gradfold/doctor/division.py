"""How a window's losses, which are means over micro-batches, were divided on their way to `.grad`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradfold.doctor.history import UpdateWindow
from gradfold.doctor.source import SourceLocation
from gradfold.doctor.syntax import has_inverse
from gradfold.engine.loss_graph import DividedTerm, Divisor

_CLOSE = 1e-4


@dataclass(frozen=True)
class Mean:
    """A mean over one micro-batch, as it enters the gradient."""

    scale: float  # its factor, in the loss and by hand in the gradients; 1 for a mean alone
    count: float  # how many values it is over; 0 where unknown
    divisors: tuple[Divisor, ...]  # without the mean's own


def means_of(window: UpdateWindow) -> list[Mean]:
    """The largest mean of every micro-batch; empty where one has none, or gradients were rewritten by hand."""
    if window.step.is_rewritten or any(one.has_hooks for one in window.micro_batches):
        return []
    means = [[mean for term in one.terms if (mean := _mean(term, window.step.ratio))] for one in window.micro_batches]
    return [max(some, key=lambda mean: abs(mean.scale)) for some in means] if all(means) else []


def _mean(term: DividedTerm, ratio: float) -> Mean | None:
    """None for a sum, or where the graph does not tell."""
    count = 0.0 if term.count is None else float(term.count)
    if term.reduction == "mean":
        return Mean(term.scale * ratio, count, term.divisors)
    if term.reduction != "sum" or not term.divisors:
        return None
    value = float(term.divisors[-1].value)
    is_count = value == count or (term.divisors[-1].by_division and value in (term.size, term.rows))
    return _mean_by_hand(term, ratio) if value > 1 and is_count else None


def _mean_by_hand(term: DividedTerm, ratio: float) -> Mean:
    """Of `sum / count`."""
    count = float(term.divisors[-1].value)
    return Mean(term.scale * count * ratio, count, term.divisors[:-1])


def means_by_varying_count(window: UpdateWindow) -> list[Mean]:
    """Where every loss is a sum divided by a number that varies within the window: means over that many values."""
    found = []
    for one in window.micro_batches:
        terms = [term for term in one.terms if term.reduction == "sum" and term.divisors]
        if len(terms) != 1 or not 1 < float(terms[0].divisors[-1].value) <= terms[0].size:
            return []
        found.append(_mean_by_hand(terms[0], window.step.ratio))
    return found if len({mean.count for mean in found}) > 1 else []


def is_close(value: float, expected: float) -> bool:
    """Whether two factors are equal up to rounding."""
    return abs(value - expected) <= _CLOSE * abs(expected)


def is_divided_by(window: UpdateWindow, n: int) -> bool:
    """Whether every loss of a window is a mean that was divided by n, and by nothing else."""
    means = means_of(window)
    return bool(means) and all(is_close(abs(mean.scale), 1 / n) for mean in means)


def num_divisions(means: Sequence[Mean], n: int, ratio: float, location: SourceLocation) -> int:
    """How often a window's losses were divided by the number of micro-batches, in the loss or by hand in `.grad`.

    `/ n` counts, and so does `* (1 / n)` where the file says `1 / something`; a constant such as 0.5 may be the weight
    of a loss, and a division of as many terms as its divisor is their mean.
    """
    by_n = [one for one in means[0].divisors if is_close(float(one.value), n) and one.num_terms != n]
    return sum(one.by_division or has_inverse(location.file) for one in by_n) + is_close(ratio, 1 / n)
