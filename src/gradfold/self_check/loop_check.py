"""The check of a loop's losses: whether weights count what the losses are means over, as their graphs tell.

A loop body runs the forward passes by itself, so nothing can be run in parts. The last operators of a loss say how many
values they averaged; of two micro-batches these numbers must be to each other as the weights. Where losses add up, a
value must count as much in one as in the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from gradfold.batch.rows import rows_of_whole
from gradfold.batch.split import MicroBatch
from gradfold.engine.loss_graph import compared_rows, terms_of
from gradfold.errors import NotDecomposableError
from gradfold.messages import warn
from gradfold.self_check.diagnosis import SUM_TEXT, find_weight, mean_text

T = TypeVar("T")

_WINDOWS = frozenset({1, 2, 3, 4, 8, 16, *(4**power for power in range(3, 20))})  # those that are looked at


class LoopCheck:
    """Looks at the losses of some windows of one loader, which add up or are means.

    It warns once where a mean is taken for one over samples, and does not tell.
    """

    def __init__(self, warns: bool, adds_up: bool = False) -> None:
        self._warns = warns
        self._adds_up = adds_up
        self._has_warned_of_pairs = False
        self._num_windows = 0
        self._first: tuple[MicroBatch, float, float] | None = None  # with the denominator of its mean, and its weight

    def begin(self) -> bool:
        """Another window; whether its losses are to be looked at."""
        self._num_windows += 1
        self._first = None
        return self._num_windows in _WINDOWS

    def check(self, part: MicroBatch, loss: Tensor, weight: float) -> None:
        """Look at the loss of a micro-batch before it is back-propagated.

        Raises:
            NotDecomposableError: it is a sum, or a mean over something else than the weight counts; where losses add
                up, it is a mean.
        """
        if not weight or not loss.requires_grad:
            return
        rows = rows_of_whole(part.data) or 0
        if not self._has_warned_of_pairs and rows > 1 and {rows, 2 * rows} & {*_read(compared_rows, loss)}:
            self._has_warned_of_pairs = True
            warn(
                f"the loss seems to compare the {rows} rows of a micro-batch with each other (a matrix over all "
                "pairs); then the mean over micro-batches is another loss than that of the batch. Pass the windows to "
                "an Accumulator, which knows, with gradfold.TwoPhaseLoss(statistic, loss)."
            )
        denominator = _divisor(loss) if self._adds_up else _denominator(loss)
        if denominator is None:
            if self._warns:
                self._warns = False
                warn(
                    "windows(..., model=) cannot see what this loss is a mean over, and counts samples. Pass as "
                    "weight= what it is a mean over; or let an Accumulator run it, which checks the loss itself."
                )
        elif self._first is None:
            self._first = part, denominator, weight
        elif self._adds_up:
            _compare_divisors(self._first, (part, denominator, weight))
        else:
            _compare(self._first, (part, denominator, weight))


def _compare_divisors(one: tuple[MicroBatch, float, float], other: tuple[MicroBatch, float, float]) -> None:
    (first, of_first, _), (second, of_second, _) = one, other
    if not math.isclose(of_first, of_second, rel_tol=1e-5):
        rows = rows_of_whole(first.data) or 0, rows_of_whole(second.data) or 0
        share = of_first / (of_first + of_second)
        fitting = find_weight(first.data, second.data, rows, share) if any(rows) else None
        raise NotDecomposableError(f"the loss {mean_text(fitting or 'lambda batch: ...')}", "mean", "loss", fitting)


def _compare(one: tuple[MicroBatch, float, float], other: tuple[MicroBatch, float, float]) -> None:
    (first, of_first, weight), (second, of_second, other_weight) = one, other
    if math.isclose(of_first * other_weight, of_second * weight, rel_tol=1e-5):
        return
    rows = rows_of_whole(first.data) or 0, rows_of_whole(second.data) or 0
    fitting = find_weight(first.data, second.data, rows, of_first / (of_first + of_second)) if any(rows) else None
    raise NotDecomposableError(
        f"the losses of two micro-batches are means over {of_first:g} and {of_second:g}, and their weights are "
        f"{weight:g} and {other_weight:g}. Pass to windows() as weight= what the mean is over: "
        f"weight={fitting or 'lambda batch: ...'}.",
        *("weights", "loss", fitting),
    )


def _read(reader: Callable[[Tensor], Sequence[T]], loss: Tensor) -> Sequence[T]:
    """What a reader of graphs finds; nothing at the operator of an extension, or one whose tensors are freed."""
    try:
        return reader(loss)
    except (RuntimeError, AttributeError, TypeError):
        return ()


def _denominator(loss: Tensor) -> float | None:
    """How much a loss is a mean over; None where its graph does not tell.

    Raises:
        NotDecomposableError: it is a sum.
    """
    terms = _read(terms_of, loss)
    if len(terms) != 1 or terms[0].has_class_weights:
        return None
    (term,) = terms
    if term.reduction == "mean":
        return None if term.count is None else float(term.count)
    if term.reduction != "sum" or not term.size:
        return None
    if term.divisors:
        return float(term.divisors[-1].value)
    if term.size > 1:
        raise NotDecomposableError(f"the loss {SUM_TEXT}", "sum", "loss")
    return 1.0


def _divisor(loss: Tensor) -> float | None:
    """What the values of a sum are divided by, which is the same in all micro-batches; None where it does not tell.

    Raises:
        NotDecomposableError: the loss is a mean.
    """
    terms = _read(terms_of, loss)
    if len(terms) != 1 or terms[0].reduction == "unknown" or not terms[0].size:
        return None
    (term,) = terms
    if term.reduction == "mean" and not term.divisors and term.size > 1:
        raise NotDecomposableError(f"the loss {mean_text('lambda batch: ...')}", "mean", "loss")
    if term.has_class_weights or not term.scale:
        return None
    return (float(term.count or 1) if term.reduction == "mean" else 1.0) / abs(term.scale)
