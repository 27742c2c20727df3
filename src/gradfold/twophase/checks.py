"""Riders: statistics without a gradient (labels, masks, counts), which ride along to the loss.

A gradient says nothing of them, so their values are compared: those of a micro-batch with those of its two parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradfold.batch.nesting import leaves_by_path
from gradfold.errors import NotDecomposableError
from gradfold.self_check.comparison import tolerance_of_types
from gradfold.self_check.experiment import Observations, ObservedRun
from gradfold.twophase.loss import Combine

__all__: list[str] = []

_FEW_OF_HALF_TYPES = 0.1  # the share of labels that rounding may turn into others: those of near ties


class NonDifferentiableStatistics:
    """Those of one accumulator.

    Args:
        combine: as of `TwoPhaseLoss`.
    """

    def __init__(self, combine: Combine) -> None:
        self._combine = combine
        self._runs: Observations[dict[str, Any]] = Observations()

    def note(self, num_rows: int | None, output: Any) -> None:
        """What a run of the guard gave."""
        found = dict(leaves_by_path(output))
        kept = {path: leaf.detach() if isinstance(leaf, Tensor) else leaf for path, leaf in found.items()}
        self._runs.note(num_rows, {path: leaf for path, leaf in kept.items() if not _has_gradient(found[path])})

    def judge(self, is_content: bool, dtypes: Iterable[torch.dtype | None]) -> None:
        """Hold the parts against the whole, where the guard was content; `dtypes` are those in which is computed.

        Raises:
            NotDecomposableError: they do not make it up.
        """
        found = self._runs.take()
        if found is None or not is_content:
            return
        parts = sorted(found.parts, key=lambda run: run.num_rows)
        tolerance = tolerance_of_types(dtypes)
        for path, whole in found.whole.seen.items():
            if all(path in part.seen for part in parts):
                first, second = (part.seen[path] for part in parts)
                said = self._differ(whole, first, second, tolerance)
                if said and parts[0].num_rows == parts[1].num_rows:  # which of them came first nobody knows
                    said = self._differ(whole, second, first, tolerance) and said
                if said:
                    raise self._refused(path, found.whole, parts, said)

    def _differ(self, whole: Any, first: Any, second: Any, tolerance: float) -> str:
        """In what the parts, combined, differ from the whole; nothing where they do not."""
        if not all(isinstance(one, Tensor) for one in (whole, first, second)):
            return self._numbers_differ(whole, first, second)
        shapes = [one.shape[self._combine == "concatenate" :] for one in (whole, first, second)]
        if len({*shapes}) > 1 or len({one.dtype for one in (whole, first, second)}) > 1:
            return ""  # which cannot be combined in a window either, and is refused there
        together = torch.cat([first, second]) if self._combine == "concatenate" else first + second
        if together.shape != whole.shape:
            return f"{len(whole)} entries for the whole, {len(first)} and {len(second)} for the parts"
        return _values_differ(whole, together, tolerance)

    def _numbers_differ(self, whole: Any, first: Any, second: Any) -> str:
        if self._combine == "sum" and {type(whole), type(first), type(second)} <= {int, float}:
            is_right = abs(first + second - whole) <= 1e-6 * (abs(first) + abs(second))
        else:
            is_right = whole == first == second or whole != whole
        return "" if is_right else f"{whole!r} for the whole, {first!r} and {second!r} for the parts"

    def _refused(
        self, path: str, whole: ObservedRun[Any], parts: list[ObservedRun[Any]], seen: str
    ) -> NotDecomposableError:
        rule = (
            "one below the other, are not those of both together. A label must be the same whichever rows run with it: "
            "no index within the batch (torch.arange(len(batch))), no number of rows, no rank or mean among them. "
            "Compute that in loss(model, statistics)"
            if self._combine == "concatenate"
            else "added up, are not those of both together. Return sums over rows, no means; divide in loss(model, "
            "statistics)"
        )
        sizes = " and ".join(str(part.num_rows) for part in parts)
        return NotDecomposableError(
            f"the statistic {path or 'S'} of the TwoPhaseLoss does not go together: those of two parts of a "
            f"micro-batch ({sizes} of {whole.num_rows} rows), {rule}. Seen: {seen}.",
            "coupled",
            "loss",
        )


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _values_differ(whole: Tensor, together: Tensor, tolerance: float) -> str:
    is_same = (whole == together) | ((whole != whole) & (together != together))
    if bool(is_same.all()):
        return ""
    if whole.is_floating_point() or whole.is_complex():
        difference = torch.where(is_same, torch.zeros_like(whole), together - whole)
        size = torch.linalg.vector_norm(torch.where(whole.isfinite(), whole, torch.zeros_like(whole)))
        if float(torch.linalg.vector_norm(difference)) <= tolerance * max(float(size), torch.finfo(torch.float32).tiny):
            return ""
    elif float((~is_same).double().mean()) < (_FEW_OF_HALF_TYPES if tolerance > 1e-2 else tolerance):
        return ""
    at = tuple(int(one) for one in (~is_same).nonzero()[0])
    where = f" at {list(at)}" if at else ""
    return f"{whole[at].item()}{where} of the whole, {together[at].item()} of the parts"
