"""RNG order: which rows' random numbers come next, where micro-batches run in order, or in turns (exact BatchNorm)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

from torch import nn

from gradfold.batch.nesting import Batch
from gradfold.batch.rows import Rows
from gradfold.batchnorm.intercept import current_forward
from gradfold.engine.loss_terms import LossFn
from gradfold.self_check.rng_replay import RowRandomness, is_random
from gradfold.self_check.torch_private import TorchDispatchMode, operator_name
from gradfold.twophase.loss import TwoPhaseLoss


class WindowRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode around a window, with one `RowRandomness` inside for each forward pass.

    What a backward pass draws (a checkpoint that runs again) belongs to the last forward pass where micro-batches run
    in order, and cannot be told apart where they run in turns.

    Args:
        make: the mode for some rows.
        order: the rows of micro-batches, in the order in which they begin.
        in_turns: whether the forward pass of one is suspended for that of another.
    """

    def __init__(self, make: Callable[[Rows], RowRandomness], order: Sequence[Rows], in_turns: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._make = make
        self._ahead = cycle(order)
        self._in_turns = in_turns
        self._is_forward = False
        self._modes: list[RowRandomness] = []
        self._drew: str | None = None

    def around(self, loss_fn: LossFn) -> LossFn:
        """`loss_fn` with the draws of the rows that it is called with; in two phases each micro-batch comes twice."""
        if isinstance(loss_fn, TwoPhaseLoss):
            return replace(loss_fn, statistic=self._around(loss_fn.statistic))
        return self._around(loss_fn)

    def _around(self, function: Callable[[nn.Module, Batch], Any]) -> Callable[[nn.Module, Batch], Any]:
        def call(model: nn.Module, batch: Batch) -> Any:
            mode = self._make(next(self._ahead))
            mode.restores_on_exit = False  # other forward passes may draw from the same generators
            self._modes.append(mode)
            self._is_forward = True
            try:
                with mode:
                    return function(model, batch)
            finally:
                self._is_forward = False

        return call

    @property
    def unknown(self) -> str | None:
        """The first operator whose draws could not be handed to rows, if any."""
        return next((name for name in (self._drew, *(mode.unknown for mode in self._modes)) if name is not None), None)

    @property
    def dims(self) -> Mapping[int, int]:
        """By number of a draw, the dimension that holds its rows."""
        return {number: dim for mode in self._modes for number, dim in mode.dims.items()}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for mode in reversed(self._modes):  # the first to have met a generator has the last word
            mode.finish()
            mode.restore_generators()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_random(func):
            if self._in_turns and current_forward.get() is None:
                self._drew = self._drew or operator_name(func)
            elif not self._in_turns and not self._is_forward and self._modes:
                return self._modes[-1].__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))
