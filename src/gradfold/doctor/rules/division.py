"""A division: by what a window's losses, which are means over micro-batches, were divided on their way to `.grad`."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from gradfold.doctor.events import Backward
from gradfold.doctor.history import UpdateWindow
from gradfold.doctor.loss_graph import DividedTerm, Divisor
from gradfold.doctor.source import SourceLocation, syntax

__all__: list[str] = []

_CLOSE = 1e-4


@dataclass(frozen=True)
class Mean:
    """A mean over one micro-batch, as it enters the gradient.

    Attributes:
        scale: what it was multiplied by, in the loss and by hand in the gradients; 1 for a mean that stands by itself.
        count: over how many it is; 0 where that is not known.
        rows: rows of the micro-batch in it; 0 where that is not known.
        divisors: what it was divided by, the mean's own apart.
        kind: name of the operator.
    """

    scale: float
    count: float
    rows: int
    divisors: tuple[Divisor, ...]
    kind: str


def mean_of(one: Backward, ratio: float = 1.0) -> Mean | None:
    """The mean that weighs most in a loss; None where it is a sum, or nothing that is known.

    Args:
        one: the backward pass.
        ratio: what the gradients were multiplied by hand afterwards.
    """
    means = [mean for term in one.terms if (mean := _mean(term, ratio)) is not None]
    return max(means, key=lambda mean: abs(mean.scale)) if means else None


def means_of(window: UpdateWindow) -> list[Mean] | None:
    """Of every micro-batch of a window; None where one has none, or gradients were rewritten by hand."""
    if window.step.is_rewritten or any(one.is_hooked for one in window.micro_batches):
        return None
    means = [mean_of(one, window.step.ratio) for one in window.micro_batches]
    known = [mean for mean in means if mean is not None]
    return known if known and len(known) == len(means) else None


def _mean(term: DividedTerm, ratio: float) -> Mean | None:
    if term.reduction == "mean":
        count = 0.0 if term.count is None else float(term.count)
        return Mean(term.scale * ratio, count, term.rows, term.divisors, term.kind)
    if term.reduction != "sum" or not term.divisors:
        return None
    own = term.divisors[-1]  # a mean by hand: sum() / something
    value = float(own.value)
    rest = term.divisors[:-1]
    scale = term.scale * value * ratio
    if value > 1 and own.by_division and value in (term.size, term.rows):
        return Mean(scale, value, term.rows, rest, term.kind)
    if term.count is not None and value == float(term.count) > 1:
        return Mean(scale, value, term.rows, rest, term.kind)
    return None


def counted_by_hand(window: UpdateWindow) -> list[Mean] | None:
    """Where every loss is a sum divided by a number that changes within the window: means by hand, over that many."""
    found = []
    for one in window.micro_batches:
        terms = [term for term in one.terms if term.reduction == "sum" and term.divisors]
        if len(terms) != 1 or not 1 < (value := float(terms[0].divisors[-1].value)) <= terms[0].size:
            return None
        term = terms[0]
        rest = term.divisors[:-1]
        found.append(Mean(term.scale * value * window.step.ratio, value, term.rows, rest, term.kind))
    return found if len({mean.count for mean in found}) > 1 else None


def is_close(value: float, expected: float) -> bool:
    """Whether two factors are the same but for rounding."""
    return abs(value - expected) <= _CLOSE * abs(expected)


def num_divisions(means: Sequence[Mean], n: int, ratio: float, place: SourceLocation) -> int:
    """How often a window's losses were divided by the number of micro-batches, in the loss or by hand in `.grad`.

    `/ n` counts, and so does `* (1 / n)` where the code says `1 / something`; a constant such as 0.5 may be the weight
    of a loss, and a division of as many terms as it divides by is their mean.
    """
    divisors = means[0].divisors
    counted = 0
    for divisor in divisors:
        value = float(divisor.value)
        if not is_close(value, n) or divisor.num_terms == round(value):
            continue
        counted += divisor.by_division or _says_one_over(place)
    return counted + is_close(ratio, 1 / n)


def _says_one_over(place: SourceLocation) -> bool:
    for node in ast.walk(syntax(place.file)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.left, ast.Constant):
            return True
    return False
