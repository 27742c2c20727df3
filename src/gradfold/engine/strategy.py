"""A strategy: in which order the forward and backward passes of a window run.

The plain order is `Sequential`. Losses and layers that couple the samples of a batch need another one, and implement
`Strategy`: `batchnorm/` and `twophase/`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeAlias, final

from torch import nn

from gradfold.engine.backward import Weighed
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.window import Context, Window
from gradfold.errors import NotDecomposableError
from gradfold.state.snapshot import Snapshot

Run: TypeAlias = Callable[[Any, Sequence[int], Snapshot], None]
"""`Strategy.run`, or something around it: a timer, turns of ranks."""


class Passes(Protocol):
    """The passes of a window: its own, or other ones in their place."""

    @property
    def context(self) -> Context:
        """What the window runs in."""

    def forward(self, index: int) -> Weighed:
        """Run the forward pass of a micro-batch."""

    def backward(self, weighed: Weighed) -> None:
        """Back-propagate what it gave."""


class Strategy(ABC):
    """How the windows of one accumulator run. Abstract; its subclasses are final.

    Attributes:
        probe_loss: what the self-check runs on parts of a micro-batch.
        probes_loss: whether `probe_loss` is the loss itself, with its terms.
        runs_zero_weight: whether micro-batches of weight 0 run like the others, which depend on their rows.
        has_own_gradients: whether each micro-batch has a separate gradient, which can be inspected.
        joins_ranks: whether rows depend on those of other ranks.
        coupling: what makes the whole batch share its memory, as a subject; empty where micro-batches share none.
        shards_refused: why processes cannot hold a part of the model each; empty where they can.
    """

    probes_loss = True
    runs_zero_weight = False
    has_own_gradients = True
    joins_ranks = False
    coupling = ""
    shards_refused = ""

    def __init__(self, probe_loss: LossFn) -> None:
        self.probe_loss = probe_loss

    @abstractmethod
    def run(self, window: Any, indices: Sequence[int], snapshot: Snapshot) -> None:
        """Run forward and backward passes of these micro-batches.

        Args:
            window: a `Window`, or where the order is plain any `Passes`.
            indices: of the micro-batches.
            snapshot: what to go back to where the window has to begin again.
        """

    def is_sequential(self, context: Context) -> bool:
        """Whether micro-batches run one after another, each as if it were alone."""
        return False

    def is_whole(self, window: Window) -> bool:
        """Whether all that depends on each other is in one micro-batch, which then runs as in plain torch."""
        is_alone = not self.joins_ranks or window.context.coordinator.num_ranks == 1
        return len(window.micro_batches) == 1 and is_alone

    def depends_on_split(self, context: Context) -> bool:
        """Whether layers normalize by micro-batch, so that a halved one has other statistics."""
        return False

    def watching(self, context: Context) -> AbstractContextManager[None]:
        """Around forward passes that run by themselves: raises GradfoldError where a micro-batch cannot run."""
        return nullcontext()

    def find_offender(self, window: Window) -> int | None:
        """The micro-batch that made the losses of others not finite as well; None where each stands for itself."""
        return None

    # What the self-check asks.

    def split_dependent_layers(self, context: Context) -> Mapping[str, nn.Module] | None:
        """Layers that are known to depend on the split, by name, which a probe freezes; None: they cannot be frozen."""
        return {}

    def judge(self, is_passed: bool) -> None:
        """Look at what the self-check's runs showed besides gradients.

        Args:
            is_passed: whether the self-check has found that parts fit the whole.

        Raises:
            GradfoldError: the window is not supported.
        """

    def explain(self, error: NotDecomposableError) -> NotDecomposableError:
        """What the self-check has found, in the user's words."""
        return error


def run_in_order(window: Passes, indices: Sequence[int], snapshot: Snapshot | None = None) -> None:
    """One micro-batch after another, as if each were alone."""
    for index in indices:
        window.backward(window.forward(index))


@final
class Sequential(Strategy):
    """One micro-batch after another: the activations of one are alive at a time."""

    def run(self, window: Passes, indices: Sequence[int], snapshot: Snapshot) -> None:
        """Run the micro-batches in order."""
        run_in_order(window, indices)

    def is_sequential(self, context: Context) -> bool:
        """Always."""
        return True
