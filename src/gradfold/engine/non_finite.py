"""An inspection: a window run with one gradient at a time, to see which micro-batches make its gradient non-finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from gradfold.engine.backward import Weighed
from gradfold.engine.window import Backward, Forward, Schedule, Window
from gradfold.errors import NonFiniteGradientError
from gradfold.state.gradients import non_finite_names
from gradfold.state.snapshot import Snapshot

__all__: list[str] = []


class Inspection:
    """Goes around a schedule: looks at the gradient of each micro-batch by itself, and drops it.

    Attributes:
        bad: the micro-batches whose gradient is not finite, with the names of the parameters.
    """

    def __init__(self, model: nn.Module, transaction: Snapshot) -> None:
        self._model = model
        self._transaction = transaction
        self.bad: dict[int, tuple[str, ...]] = {}

    def around(self, schedule: Schedule) -> Schedule:
        """The schedule, with a look after every backward pass."""

        def run(indices: Sequence[int], forward: Forward, backward: Backward) -> None:
            begun: list[int] = []
            self.bad.clear()

            def noting(index: int) -> Weighed:
                begun.append(index)
                return forward(index)

            def looking(weighed: Weighed) -> None:
                backward(weighed)
                names = non_finite_names(self._model)
                if names:
                    self.bad[begun[-1]] = names
                self._transaction.empty_gradients()

            schedule(indices, noting, looking)

        return run


def accuse(window: Window, bad: Mapping[int, tuple[str, ...]]) -> NonFiniteGradientError:
    """The error that names the first micro-batch to blame; `bad` as in `Inspection`, empty where none was found."""
    if not bad:
        return _unexplained(window)
    index = min(bad)
    part, names = window.micro_batches[index], bad[index]
    return NonFiniteGradientError(
        f"the loss of micro-batch {index} of {len(window.micro_batches)}{part.where} is finite, its gradient of "
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} is not. Look for "
        "sqrt or norm at 0, division by a standard deviation of 0, or overflow. "
        'on_non_finite="skip_micro_batch" leaves such micro-batches out, "skip_update" such batches.',
        index,
        part.rows,
        names,
    )


def accuse_all(window: Window) -> NonFiniteGradientError:
    """The error for micro-batches that make one gradient, of which none has its own."""
    names = non_finite_names(window.model)
    return NonFiniteGradientError(
        f"the gradient of the batch is not finite ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}), though "
        "its losses are. All micro-batches are in it together, so none can be named. Look for sqrt or norm at 0, "
        'division by a standard deviation of 0, or overflow. on_non_finite="skip_update" leaves such batches out.',
        None,
        range(window.num_samples),
        names,
    )


def _unexplained(window: Window) -> NonFiniteGradientError:
    return NonFiniteGradientError(
        "the gradient of the batch is not finite, and no micro-batch could be found whose own is not when it runs "
        "again: their sum is more than a float holds, or loss_fn does not give the same twice.",
        None,
        range(window.num_samples),
        (),
    )
