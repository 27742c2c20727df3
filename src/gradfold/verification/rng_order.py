"""Draws in turn: the random numbers of a batch handed to its rows where micro-batches run in lock-step.

Draws in order: the random numbers of a batch handed to its rows where micro-batches run one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from gradfold.batch.nesting import Batch
from gradfold.batch.rows import Rows
from gradfold.batchnorm.intercept import passage
from gradfold.engine.loss_terms import LossFn, LossOutput
from gradfold.self_check.rng_replay import RandomOperators, SharedRandomness, SlicedRandomness, is_random
from gradfold.twophase.loss import TwoPhaseLoss

__all__: list[str] = []


class RandomnessInOrder:
    """One mode around all micro-batches, their backward passes included, which is told whose rows come next.

    Args:
        make: the mode for some rows.
        order: the rows of micro-batches, in the order in which they run.
    """

    def __init__(self, make: Callable[[Rows], SlicedRandomness | SharedRandomness], order: Sequence[Rows]) -> None:
        self._mode = make(order[0])
        self._order = order

    def __enter__(self) -> RandomnessInOrder:
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
        return self._mode.unknown if isinstance(self._mode, SlicedRandomness) else None

    @property
    def dims(self) -> Mapping[int, int]:
        """By number of a draw, the dimension that holds its rows."""
        return self._mode.dims if isinstance(self._mode, SlicedRandomness) else {}

    def finish(self) -> None:
        """Note whether some rows made other draws than the batch."""
        if isinstance(self._mode, SlicedRandomness):
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


class RandomnessInTurns(RandomOperators):  # type: ignore[no-untyped-call]
    """A mode of its own for the forward pass of each micro-batch; what the backward pass draws, nobody foresees.

    Args:
        make: the mode for some rows.
        order: the rows of micro-batches, in the order in which they begin.
    """

    def __init__(self, make: Callable[[Rows], SlicedRandomness | SharedRandomness], order: Sequence[Rows]) -> None:
        super().__init__()
        self._make = make
        self._ahead = iter(order)
        self._modes: list[SlicedRandomness | SharedRandomness] = []
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
        found = [mode.unknown for mode in self._modes if isinstance(mode, SlicedRandomness)]
        return next((name for name in [self._drew, *found] if name is not None), None)

    @property
    def dims(self) -> Mapping[int, int]:
        """By number of a draw, the dimension that holds its rows."""
        return {
            number: dim
            for mode in self._modes
            if isinstance(mode, SlicedRandomness)
            for number, dim in mode.dims.items()
        }

    def finish(self) -> None:
        """Note whether some rows made other draws than the batch."""
        for mode in self._modes:
            if isinstance(mode, SlicedRandomness):
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
