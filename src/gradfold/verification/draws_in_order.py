"""Draws in order: the random numbers of a batch handed to its rows where micro-batches run one after another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from gradfold.batch import Batch
from gradfold.coupled.two_phase import TwoPhaseLoss
from gradfold.draws import DrawsOfRows, EqualDraws
from gradfold.loss import LossFn
from gradfold.rows import Rows

__all__: list[str] = []


class DrawsInOrder:
    """One mode around all micro-batches, their backward passes included, which is told whose rows come next.

    Args:
        make: the mode for some rows.
        order: the rows of micro-batches, in the order in which they run.
    """

    def __init__(self, make: Callable[[Rows], DrawsOfRows | EqualDraws], order: Sequence[Rows]) -> None:
        self._mode = make(order[0])
        self._order = order

    def __enter__(self) -> DrawsInOrder:
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]

    def around(self, loss_fn: LossFn) -> LossFn:
        """`loss_fn` with the draws of the rows that it is called with; in two phases each micro-batch comes twice."""
        if isinstance(loss_fn, TwoPhaseLoss):
            return replace(loss_fn, statistic=self._around(loss_fn.statistic, [*self._order, *self._order]))
        return self._around(loss_fn, self._order)

    @property
    def unknown(self) -> str | None:
        """The first operator whose draws could not be handed to rows, if any."""
        return self._mode.unknown if isinstance(self._mode, DrawsOfRows) else None

    @property
    def dims(self) -> Mapping[int, int]:
        """By number of a draw, the dimension that holds its rows."""
        return self._mode.dims if isinstance(self._mode, DrawsOfRows) else {}

    def finish(self) -> None:
        """Note whether some rows made other draws than the batch."""
        if isinstance(self._mode, DrawsOfRows):
            self._mode.finish()

    def restore_generators(self) -> bool:
        """Set the user's own generators back to where they were when first seen; whether there were any."""
        return self._mode.restore_generators()

    def _around(
        self, function: Callable[[nn.Module, Batch], Any], order: Sequence[Rows]
    ) -> Callable[[nn.Module, Batch], Any]:
        ahead = iter(order)
        next(ahead)  # the mode begins with those
        is_first = True

        def call(model: nn.Module, batch: Batch) -> Any:
            nonlocal is_first
            if not is_first:
                self._mode.go_on_with(next(ahead))
            is_first = False
            return function(model, batch)

        return call
