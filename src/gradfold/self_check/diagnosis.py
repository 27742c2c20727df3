"""An accusation: what is wrong with a loss that cannot be accumulated, in words, and what to write instead.

A search for weights: which count in a batch gives a part of it the share that its gradient shows.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, leaves_by_path
from gradfold.errors import NotDecomposableError

__all__: list[str] = []


def is_sum(term: str) -> NotDecomposableError:
    """The parts add up to the whole without weights."""
    return NotDecomposableError(
        f"{_subject(term)} is a sum over the rows, not a mean, so that its size depends on how the batch is cut. "
        "Return the mean: reduction='mean', or divide by the number of things summed and give weight= that number.",
        "sum",
        term,
    )


def ignores_seed(term: str) -> NotDecomposableError:
    """The gradients are the same whatever seed comes in."""
    return NotDecomposableError(
        f"{_subject(term)} has a backward pass that ignores the gradient coming into it (grad_output), which carries "
        "the weight of the micro-batch. Multiply by grad_output in its backward().",
        "seed",
        term,
    )


def has_other_weights(
    term: str, rows: range, num_rows: int, declared: float, fitting: float, weight: str | None, is_by_name: bool
) -> NotDecomposableError:
    """Other shares fit: `fitting` for these rows, where their weight gives `declared`."""
    if weight is None:
        remedy = (
            "Give weight= the denominator of the mean, as a function of the micro-batch: mask.sum(), "
            "class_weights[labels].sum(), or the like. If the loss compares rows (a maximum, logsumexp, a scale of its "
            "own), no weight helps: write it as gradfold.TwoPhaseLoss(statistic, loss), or run the batch whole "
            "(micro_batch_size=None)."
        )
    else:
        remedy = f"Write weight={{..., {term!r}: {weight}}}." if is_by_name else f"Write weight={weight}."
    return NotDecomposableError(
        f"{_subject(term)} is a mean over something else than weight= says: {name_rows(rows)} of a micro-batch of "
        f"{num_rows} make up {fitting:.2%} of its gradient, and {declared:.2%} by their weight. {remedy}",
        "weights",
        term,
        weight,
    )


def is_empty(term: str, rows: range, loss: float, weight: str | None) -> NotDecomposableError:
    """A part is a mean over nothing."""
    return NotDecomposableError(
        f"{_subject(term)} of {name_rows(rows)} of a micro-batch is {loss}, though that of the whole is finite: a mean "
        "over nothing. Give weight= the number of things that it averages, so that a part without any is left out: "
        f"weight={weight or '...'}.",
        "empty",
        term,
        weight,
    )


def moves_state(term: str, error: float, buffers: Sequence[str]) -> NotDecomposableError:
    """The parts fit if both begin with the same buffers."""
    return NotDecomposableError(
        f"{_subject(term)} depends on state that forward passes move ({', '.join(buffers[:3])}), so that a part sees "
        f"another state than the whole ({error:.1%} off). Freeze it while gradients accumulate, or move it once per "
        "update.",
        "state",
        term,
    )


def normalizes_by_batch(term: str, error: float) -> NotDecomposableError:
    """A functional batch_norm was seen."""
    return NotDecomposableError(
        f"{_subject(term)} normalizes by the statistics of the batch (functional batch_norm with training=True), of "
        f'which a micro-batch has its own ({error:.1%} off). Write batch_norm="exact" to normalize by the whole batch, '
        "or use group_norm or training=False.",
        "batch_norm",
        term,
    )


def couples_samples(term: str, error: float) -> NotDecomposableError:
    """Nothing else explains the difference."""
    return NotDecomposableError(
        f"{_subject(term)} makes the samples of a batch depend on each other (in-batch negatives, statistics over the "
        f"batch, rows that are mixed): no weighting of two parts gives the gradient of the whole ({error:.1%} off). "
        "Write the loss in two functions, what each row gives and what is made of all rows: "
        "loss_fn = gradfold.TwoPhaseLoss(statistic, loss), with statistic(model, micro_batch) -> tensors and "
        "loss(model, tensors of the whole batch); or run the batch whole (micro_batch_size=None).",
        "coupled",
        term,
    )


def name_rows(rows: range) -> str:
    """Rows, for a message."""
    return f"rows {rows.start} to {rows.stop - 1}" if len(rows) > 1 else f"row {rows.start}"


def _subject(term: str) -> str:
    return "the loss" if term == "loss" else f"the loss term {term!r}"


_IGNORED = (-100, -1, 0, 255)  # labels that are commonly ignored; -100 is torch's own
_LABEL_TYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
_CLOSE = 2e-3


def name_weight(first: Batch, second: Batch, rows: tuple[int, int], share: float) -> str | None:
    """The `weight=` under which `first` makes up `share` of both parts together, as Python; None if nothing fits."""
    if abs(rows[0] / sum(rows) - share) < _CLOSE:
        return '"samples"'
    others = dict(_candidates(second))
    for text, count in _candidates(first):
        total = float(count()) + float(others[text]()) if text in others else 0.0
        if total and abs(float(count()) / total - share) < _CLOSE:
            return text
    return None


def _candidates(batch: Batch) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The likeliest first: labels, then masks and other numbers per row."""
    leaves = [
        (path, leaf)
        for path, leaf in leaves_by_path(batch)
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.layout is torch.strided and not leaf.is_complex()
    ]
    labels = [(path, leaf) for path, leaf in leaves if leaf.dtype in _LABEL_TYPES]
    for ignored in _IGNORED:
        for path, leaf in labels:
            yield _token_count(path, ignored, ""), partial(_count, leaf, ignored)
        for path, leaf in labels:
            if leaf.dim() > 1:
                yield _token_count(path, ignored, ", shift=True"), partial(_count, leaf[..., 1:], ignored)
    for path, leaf in leaves:
        yield f"lambda batch: batch{path}.sum()", leaf.sum
        yield f"lambda batch: (batch{path} > 0).sum()", leaf.gt(0).sum


def _count(labels: Tensor, ignored: int) -> Tensor:
    return (labels != ignored).sum()


def _token_count(path: str, ignored: int, shift: str) -> str:
    ignore_index = "" if ignored == -100 else f", ignore_index={ignored}"
    return f"gradfold.token_count({_where(path)}{ignore_index}{shift})"


def _where(path: str) -> str:
    """A key or index as the user would write it, where the path is no more than that."""
    try:
        key = ast.literal_eval(path[1:-1]) if path.startswith("[") and path.endswith("]") else None
    except (ValueError, SyntaxError):
        key = None
    if isinstance(key, str):
        return repr(key) if '"' in key or "\\" in key else f'"{key}"'
    return str(key) if isinstance(key, int) else f"lambda batch: batch{path}"
