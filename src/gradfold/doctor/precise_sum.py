"""A precise sum: gradients of low precision added up in float32 beside `.grad`, to measure what rounding takes away."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gradfold.doctor.guard import Guard
from gradfold.doctor.ledger import Ledger

__all__: list[str] = []

_LOW = (torch.bfloat16, torch.float16)
_MOST_ELEMENTS = 1_000_000


class PreciseSums:
    """Sums of the gradients of some parameters in bfloat16 or float16, by optimizer.

    Args:
        guard: between what adds up and the script's backward passes.
    """

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._sums: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}  # by optimizer and parameter: it, and its sum
        self._size = 0

    def prepare(self, ledgers: list[Ledger]) -> None:
        """Begin to add up the parameters of low precision that are not added up yet, as far as they are few."""
        for ledger in ledgers:
            sums = self._sums.setdefault(ledger.number, {})
            for one in ledger.watched():
                if one.dtype not in _LOW or not one.requires_grad or id(one) in sums:
                    continue
                if self._size + one.numel() > _MOST_ELEMENTS:
                    break
                self._size += one.numel()
                total = torch.zeros_like(one, dtype=torch.float32, requires_grad=False)
                sums[id(one)] = one, total
                hook = partial(self._guard.attempt, "a gradient", partial(_add, total))
                hook.gradfold_doctor = True  # type: ignore[attr-defined]
                one.register_hook(hook)  # type: ignore[no-untyped-call]

    def empty(self, ledger: int) -> None:
        """The gradients of an optimizer were zeroed."""
        for _, total in self._sums.get(ledger, {}).values():
            total.zero_()

    def error(self, ledger: int) -> float | None:
        """How far an optimizer's gradients are from the precise sums, relative to them; None where nothing is summed.

        A factor common to all (from clipping) is no error.
        """
        pairs = [(one.grad, total) for one, total in self._sums.get(ledger, {}).values() if one.grad is not None]
        if not pairs or any(grad.dtype not in _LOW for grad, _ in pairs):
            return None
        grads = torch.cat([grad.detach().flatten().double() for grad, _ in pairs])
        sums = torch.cat([total.flatten().double() for _, total in pairs])
        square = float(sums.dot(sums))
        if not square:
            return None
        ratio = float(grads.dot(sums)) / square
        return float((grads - ratio * sums).norm()) / (abs(ratio) * square**0.5) if ratio else None


def _add(total: Tensor, grad: Tensor) -> None:
    total.add_(grad.detach())
