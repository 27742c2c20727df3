"""Gradients that are not finite: the micro-batches that they come from, and the errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import final

from gradfold.batch.split import MicroBatch
from gradfold.engine.backward import Weighed
from gradfold.engine.window import Window
from gradfold.errors import NonFiniteGradientError
from gradfold.messages import join_names
from gradfold.state.gradients import non_finite_names
from gradfold.state.snapshot import Snapshot


@final
class InspectedWindow(Window):
    """A window that looks at the gradient of each micro-batch by itself, and drops it.

    Attributes:
        bad: the micro-batches whose gradient is not finite, with the names of the parameters.
    """

    def __init__(self, window: Window, micro_batches: Sequence[MicroBatch], snapshot: Snapshot) -> None:
        super().__init__(
            *(window.context, window.loss_fn, micro_batches, window.weight, window.back_propagate, window.listener),
            window.runs_zero_weight,
        )
        self._snapshot = snapshot
        self.bad: dict[int, tuple[str, ...]] = {}

    def again(
        self, micro_batches: Sequence[MicroBatch], done: Mapping[int, int] = MappingProxyType({})
    ) -> InspectedWindow:
        """The window with other micro-batches; what was found in those that are kept stays."""
        window = InspectedWindow(self, micro_batches, self._snapshot)
        window.follow(self, done)
        window.bad = {done[index]: names for index, names in self.bad.items() if index in done}
        return window

    def backward(self, weighed: Weighed) -> None:
        """Back-propagate what a forward pass gave, and look at the gradient."""
        super().backward(weighed)
        names = non_finite_names(self.model)
        if names:
            self.bad[self.current] = names
        self._snapshot.empty_gradients()


def gradient_error(window: Window, bad: Mapping[int, tuple[str, ...]]) -> NonFiniteGradientError:
    """The error that names the first offending micro-batch; `bad` is that of an `InspectedWindow`, or empty."""
    if not bad:
        return NonFiniteGradientError(
            "the gradient of the batch is not finite, and no micro-batch was found whose own gradient is not finite: "
            "their sum overflows, or loss_fn does not return the same twice.",
            None,
            range(window.num_samples),
            (),
        )
    index = min(bad)
    part, names = window.micro_batches[index], bad[index]
    return NonFiniteGradientError(
        f"the loss of micro-batch {index} of {len(window.micro_batches)}{part.where} is finite, its gradient of "
        f"{join_names(names, 3)} is not. Look for sqrt or norm at 0, division by a standard deviation of 0, or "
        'overflow. on_non_finite="skip_micro_batch" leaves such micro-batches out, "skip_update" such batches.',
        index,
        part.rows,
        names,
    )


def joint_gradient_error(window: Window) -> NonFiniteGradientError:
    """The error for micro-batches that share one gradient."""
    names = non_finite_names(window.model)
    return NonFiniteGradientError(
        f"the gradient of the batch is not finite ({join_names(names, 3)}), though its losses are. All micro-batches "
        "share one backward pass, so the offending one cannot be named. Look for sqrt or norm at 0, division by a "
        'standard deviation of 0, or overflow. on_non_finite="skip_update" leaves such batches out.',
        None,
        range(window.num_samples),
        names,
    )
