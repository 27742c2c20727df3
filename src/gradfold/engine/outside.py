"""Gradients outside the model: a criterion's weights, a temperature, inputs that require grad.

A backward pass fills them, too. Where one may run again they are set aside like those of parameters.
"""

from __future__ import annotations

from typing import Any

from torch.utils.weak import WeakTensorKeyDictionary

from gradfold.engine.backward import Weighed
from gradfold.engine.graph import graph_leaves
from gradfold.errors import ModelError
from gradfold.state.gradients import GradientBuffer


class OutsideLeaves:
    """The tensors outside the model that the windows of an accumulator back-propagate to, as far as is known.

    A walk through the graph of every micro-batch finds them. Once a window has found no new ones that outlive it,
    those after it take them as known, and go without the walk until something has to run again.

    Attributes:
        known: those of earlier windows that still exist.
        settled_version: of the context in which there are no others.
    """

    def __init__(self) -> None:
        self.known: Any = WeakTensorKeyDictionary()
        self.settled_version = -1

    def set_aside(self, weighed: Weighed, gradients: GradientBuffer, is_late: bool) -> None:
        """Set aside what a backward pass of these terms fills; one behind a reentrant checkpoint is not found.

        Args:
            weighed: the terms.
            gradients: where to.
            is_late: whether passes of this window ran before without a look, as one after many others does.

        Raises:
            ModelError: they may have filled one that was not known.
        """
        leaf = gradients.set_aside(graph_leaves(term for term, _ in weighed), only_empty=is_late)
        if leaf is not None:
            raise ModelError(
                f"loss_fn back-propagates to a tensor of shape {tuple(leaf.shape)} outside the model, as no earlier "
                "window did, so micro-batches cannot run again: its gradient would count them twice. It holds a part "
                "of this window now; set it to None. Pass what holds the tensor as a part of the model: "
                "Accumulator(nn.ModuleList([model, criterion]), ...)."
            )

    def learn(self, gradients: GradientBuffer, version: int) -> None:
        """A window that looked at all of its backward passes is complete."""
        found = list(gradients.outside)
        if all(leaf in self.known for leaf in found):
            self.settled_version = version
        self.known.update(dict.fromkeys(found))
