"""Gradients that are not finite: the micro-batches that they come from, and the errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradfold.engine.strategy import Run
from gradfold.engine.window import Window
from gradfold.errors import NonFiniteGradientError
from gradfold.messages import join_names
from gradfold.state.gradients import non_finite_names
from gradfold.state.snapshot import Snapshot

_LOOK_FOR = "Look for sqrt or norm at 0, division by a standard deviation of 0, or overflow."


def inspect_each(
    run: Run, found: dict[int, tuple[str, ...]], window: Window, indices: Sequence[int], snapshot: Snapshot
) -> None:
    """Run micro-batches one by one, and drop each gradient.

    `found` gets the parameters whose gradient is not finite, by the `id` of a micro-batch, whose index may change.
    """
    for index in indices:
        snapshot.set_savepoint()
        run(window, [index], snapshot)
        found[id(window.micro_batches[index])] = non_finite_names(window.model)
        snapshot.empty_gradients()
        window.done |= {index}


def gradient_error(window: Window, bad: Mapping[int, tuple[str, ...]]) -> NonFiniteGradientError:
    """The error that names the first offending micro-batch; `bad`: these, with the names of parameters."""
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
        f"{join_names(names, 3)} is not. {_LOOK_FOR} "
        'on_non_finite="skip_micro_batch" leaves such micro-batches out, "skip_update" such batches.',
        index,
        part.rows,
        names,
    )


def joint_gradient_error(window: Window) -> NonFiniteGradientError:
    """The error for micro-batches that share one gradient."""
    names = non_finite_names(window.model)
    return NonFiniteGradientError(
        f"the gradient of the batch is not finite ({join_names(names, 3)}), though its losses are. All micro-batches "
        f"share one backward pass, so the offending one cannot be named. {_LOOK_FOR} "
        'on_non_finite="skip_update" leaves such batches out.',
        None,
        range(window.num_samples),
        names,
    )
