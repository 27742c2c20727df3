"""Draws in turn: the random numbers of a batch handed to its rows where micro-batches run in lock-step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from gradfold.batch import Batch
from gradfold.coupled.attendance import passage
from gradfold.draws import DrawsOfRows, EqualDraws, RandomOperators, is_random
from gradfold.loss import LossFn, LossOutput
from gradfold.rows import Rows

__all__: list[str] = []


class DrawsInTurn(RandomOperators):  # type: ignore[no-untyped-call]
    """A mode of its own for the forward pass of each micro-batch; what the backward pass draws, nobody foresees.

    Args:
        make: the mode for some rows.
        order: the rows of micro-batches, in the order in which they begin.
    """

    def __init__(self, make: Callable[[Rows], DrawsOfRows | EqualDraws], order: Sequence[Rows]) -> None:
        super().__init__()
        self._make = make
        self._ahead = iter(order)
        self._modes: list[DrawsOfRows | EqualDraws] = []
        self._drew: str | None = None

    def around(self, loss_fn: LossFn) -> LossFn:
        """`loss_fn` with the draws of the rows that it is called with."""

        def call(model: nn.Module, batch: Batch) -> LossOutput:
            mode = self._make(next(self._ahead))
            self._modes.append(mode)
            with mode:
                return loss_fn(model, batch)

        return call

    @property
    def unknown(self) -> str | None:
        """The first operator whose draws could not be handed to rows, if any."""
        found = [mode.unknown for mode in self._modes if isinstance(mode, DrawsOfRows)]
        return next((name for name in [self._drew, *found] if name is not None), None)

    @property
    def dims(self) -> Mapping[int, int]:
        """By number of a draw, the dimension that holds its rows."""
        return {
            number: dim for mode in self._modes if isinstance(mode, DrawsOfRows) for number, dim in mode.dims.items()
        }

    def finish(self) -> None:
        """Note whether some rows made other draws than the batch."""
        for mode in self._modes:
            if isinstance(mode, DrawsOfRows):
                mode.finish()

    def restore_generators(self) -> bool:
        """Set the user's own generators back to where they were when first seen; whether there were any."""
        found = [mode.restore_generators() for mode in self._modes[::-1]]  # the first to have seen it has the last word
        return any(found)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_random(func) and passage.get() is None:  # a checkpoint that runs again
            self._drew = self._drew or func._opname
        return func(*args, **(kwargs or {}))
