"""What is checked of a two-phase loss, beside the gradients that the self-check compares.

In the self-check: the values of labels, masks and counts. At the end of a window: whether the loss and its gradient are
finite, and whether the second run of every micro-batch is like the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold.engine.window import Window
from gradfold.errors import NonFiniteGradientError, NonFiniteLossError, NotDecomposableError, RecomputeError
from gradfold.self_check.comparison import tolerance_of
from gradfold.self_check.observations import ObservedRun
from gradfold.twophase.loss import Combine
from gradfold.twophase.statistics import Statistics

_FEW_OF_HALF_TYPES = 0.1  # the fraction of labels that rounding may change: near ties

_ROWS = (
    "concatenated, are not those of the micro-batch. A label must be the same whichever rows run with it: not an index "
    "within the batch (torch.arange(len(batch))), not a number of rows, not a rank or mean among them. Compute that in "
    "loss(model, statistics)"
)
_SUMS = "summed, are not those of the micro-batch. Return sums over rows, not means; divide in loss(model, statistics)"


def check_constants(
    found: Sequence[ObservedRun[dict[str, Any]]], combine: Combine, dtypes: Iterable[torch.dtype | None]
) -> None:
    """Raise NotDecomposableError where labels, masks or counts of two parts, combined, are not those of the whole.

    They come by path, of the whole and its parts; `dtypes` are those of the computation.
    """
    parts = sorted(found[1:], key=lambda run: run.num_rows)
    tolerance = tolerance_of(dtypes).statistic
    for path, whole in found[0].seen.items():
        if all(path in part.seen for part in parts):
            first, second = (part.seen[path] for part in parts)
            seen = _differ(whole, first, second, combine, tolerance)
            if seen and parts[0].num_rows == parts[1].num_rows:  # which of them came first is unknown
                seen = _differ(whole, second, first, combine, tolerance) and seen
            if seen:
                rule = _ROWS if combine == "concatenate" else _SUMS
                raise NotDecomposableError(
                    f"the statistic {path or 'S'} of the TwoPhaseLoss cannot be combined: those of two parts of a "
                    f"micro-batch ({parts[0].num_rows} and {parts[1].num_rows} of {found[0].num_rows} rows), "
                    f"{rule}. Seen: {seen}.",
                    "coupled",
                    "loss",
                )


def _differ(whole: Any, first: Any, second: Any, combine: Combine, tolerance: float) -> str:
    """How the parts, combined, differ from the whole; an empty text where they do not."""
    if not all(isinstance(one, Tensor) for one in (whole, first, second)):
        if combine == "sum" and {type(whole), type(first), type(second)} <= {int, float}:
            is_right = abs(first + second - whole) <= 1e-6 * (abs(first) + abs(second))
        else:
            is_right = whole == first == second or whole != whole
        return "" if is_right else f"{whole!r} for the whole, {first!r} and {second!r} for the parts"
    shapes = [one.shape[combine == "concatenate" :] for one in (whole, first, second)]
    if len({*shapes}) > 1 or len({one.dtype for one in (whole, first, second)}) > 1:
        return ""  # a window refuses this itself
    combined = torch.cat([first, second]) if combine == "concatenate" else first + second
    if combined.shape != whole.shape:
        return f"{len(whole)} entries for the whole, {len(first)} and {len(second)} for the parts"
    return _tensors_differ(whole, combined, tolerance)


def _tensors_differ(whole: Tensor, combined: Tensor, tolerance: float) -> str:
    is_same = (whole == combined) | ((whole != whole) & (combined != combined))
    if bool(is_same.all()):
        return ""
    if whole.is_floating_point() or whole.is_complex():
        difference = torch.where(is_same, torch.zeros_like(whole), combined - whole)
        size = torch.linalg.vector_norm(torch.where(whole.isfinite(), whole, torch.zeros_like(whole)))
        if float(torch.linalg.vector_norm(difference)) <= tolerance * max(float(size), torch.finfo(torch.float32).tiny):
            return ""
    elif float((~is_same).double().mean()) < (_FEW_OF_HALF_TYPES if tolerance > 1e-2 else tolerance):
        return ""
    at = tuple(int(one) for one in (~is_same).nonzero()[0])
    where = f" at {list(at)}" if at else ""
    return f"{whole[at].item()}{where} of the whole, {combined[at].item()} of the parts"


def check_window(
    window: Window, statistics: Statistics, losses: Mapping[str, Tensor], compute: torch.dtype | None, raises: bool
) -> None:
    """Raise where the second run of a micro-batch did not reproduce the first, or (`raises`) something is not finite.

    It takes one transfer from the device. `compute` is the dtype of autocast.
    """
    deviations = statistics.deviations
    flags = [(~one.grad.isfinite()).any() for one in statistics.tensors() if one.grad is not None]
    waiting = [*losses.values(), *flags, *deviations.values()]
    read = torch.stack([one.to(window.device, torch.float64) for one in waiting]).cpu()
    of_losses, of_flags, of_deviations = torch.split(read, [len(losses), len(flags), len(deviations)])
    values = dict(zip(losses, of_losses.tolist(), strict=True))
    if raises and not all(map(math.isfinite, values.values())):
        raise _non_finite_loss(window, statistics, values)
    if raises and any(of_flags.tolist()):
        raise NonFiniteGradientError(
            "the loss is finite, its gradient with respect to the statistics is not. Look in loss(model, statistics) "
            "for sqrt or norm at 0, division by a standard deviation of 0, or overflow.",
            None,
            range(window.num_samples),
            (),
        )
    pairs = zip(of_deviations.tolist(), deviations, strict=True)
    known = [(distance, index) for distance, index in pairs if not math.isnan(distance)]
    worst, index = max(known, default=(0.0, 0))
    dtypes = {one.dtype for one in (*window.context.parameters, *statistics.tensors())}
    if worst > tolerance_of({compute, *dtypes}).statistic:
        raise RecomputeError(
            f"the statistics of micro-batch {index} of {len(window.micro_batches)}{window.micro_batches[index].where} "
            f"differ by {worst:.1%} in its second forward pass, from the same rows and the same random states of "
            "torch, numpy and Python. A two-phase loss runs every micro-batch twice: look in statistic(model, "
            "micro_batch) for a custom generator, a counter or queue outside of the model, a file that is read on, or "
            "a kernel that is not deterministic (torch.use_deterministic_algorithms(True) names it).",
            index,
            worst,
        )


def _non_finite_loss(window: Window, statistics: Statistics, values: Mapping[str, float]) -> NonFiniteLossError:
    name, value = next((name, value) for name, value in values.items() if not math.isfinite(value))
    bad = statistics.first_non_finite()
    index = bad or 0
    where = (
        f"the statistics of micro-batch {index} of {len(window.micro_batches)}{window.micro_batches[index].where} are "
        "not finite. Look there for overflow, a division by a norm of 0, or rows that are not finite"
        if bad is not None
        else "the statistics of this rank are finite. Look in loss(model, statistics) for log(0), overflow, a "
        "temperature near 0, or a ratio of empty sums"
    )
    return NonFiniteLossError(
        f"the loss term {name!r} of the whole batch is {value}; {where}; or for a learning rate too high.",
        index,
        name,
        value,
    )
