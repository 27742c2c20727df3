"""A transaction: what a window found in gradients, buffers and random state, until it has something to leave there.

It ends in one of three ways: the new gradients join those found, everything is as it was at the opening (on any
exception), or the window is given up, which leaves no gradient at all. On the way it can go back to the beginning, or
to the savepoint of the last micro-batch, where nothing but random state has moved since.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from torch import Tensor, nn

from gradfold.state.buffers import BufferKeeper
from gradfold.state.gradients import GradientBuffer, non_finite_flags
from gradfold.state.rng import RandomState

__all__: list[str] = []


class Snapshot:
    """Opened and closed by a `with` block.

    Args:
        model: that is trained.
        modules: all of the model's, since to walk through them takes its time.
        parameters: all of the model's.
        buffers: what earlier windows have learned of them.
        set_aside: sets gradients aside.

    Attributes:
        modules: as given.
        parameters: as given.
        gradients: the `.grad` fields, with those found at the opening set aside.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        parameters: Sequence[nn.Parameter],
        buffers: BufferKeeper,
        set_aside: Callable[[Sequence[nn.Parameter]], GradientBuffer] = GradientBuffer,
    ) -> None:
        self._model = model
        self.modules = modules
        self.parameters = parameters
        self._buffers = buffers
        self._set_aside = set_aside
        self._is_given_up = False

    def __enter__(self) -> Snapshot:
        self._random_state = self._beginning = RandomState.record(self.parameters)
        self._buffers.open(self.modules)
        self.gradients = self._set_aside(self.parameters)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._roll_back()
        elif not self._is_given_up:
            self._commit()

    def begin(self) -> None:
        """The batch is cut and weighed, for which random numbers may have been drawn: a rewind goes back to here."""
        self._beginning = RandomState.record(self.parameters)

    def settle(self) -> list[Tensor]:
        """The last micro-batch is done: bring the new gradients into the form in which they are handed over.

        Returns:
            Flags, 0-d on the device, of which one is not 0 where a gradient is not finite.
        """
        self.gradients.settle()
        self._buffers.learn()
        return non_finite_flags(self.parameters)

    def rewind(self) -> None:
        """Set everything to where it was at the beginning, with empty gradients: the window begins again."""
        self.gradients.empty(self._model.parameters())
        self._buffers.restore()
        self._buffers.open(self.modules)
        self._beginning.restore()

    def empty_gradients(self) -> None:
        """Drop the new gradients."""
        self.gradients.empty(self._model.parameters())

    def give_up(self) -> None:
        """Leave no gradient, neither a new one nor those found, and buffers as they were; random state has moved on."""
        self.gradients.give_up(self._model.parameters())
        self._buffers.restore()
        self._is_given_up = True

    def has_drawn(self) -> bool:
        """Whether torch's random state has moved since the beginning."""
        return self._beginning.has_moved()

    def savepoint(self) -> Savepoint:
        """Where a micro-batch begins."""
        return Savepoint(self.parameters, RandomState.record(self.parameters))

    def go_back_to(self, savepoint: Savepoint) -> bool:
        """Undo the micro-batch that began there; False, and nothing is undone, where it has left a trace.

        Traces that cannot be undone alone: gradients that a backward pass has added to, and buffers that any forward
        pass of this window has changed, since only their values at the opening are kept.
        """
        if savepoint.is_touched() or self._buffers.have_changed():
            return False
        savepoint.random_state.restore()
        return True

    def _commit(self) -> None:
        try:
            self.gradients.add_back()
        except BaseException:
            self._roll_back()
            raise
        self._buffers.close()

    def _roll_back(self) -> None:
        self.gradients.put_back(self._model.parameters())
        self._random_state.restore()
        self._buffers.restore()  # last, since it may warn


class Savepoint:
    """The gradients and the random state at the start of a micro-batch."""

    def __init__(self, parameters: Sequence[nn.Parameter], random_state: RandomState) -> None:
        self.random_state = random_state
        self._parameters = parameters
        # The tensors themselves: a new one may get the address, and so the id, of one that is gone.
        self._marks = [_mark(parameter) for parameter in parameters]

    def is_touched(self) -> bool:
        """Whether a gradient has changed since."""
        return any(
            gradient is not parameter.grad or (gradient is not None and gradient._version != version)
            for parameter, (gradient, version) in zip(self._parameters, self._marks, strict=True)
        )


def _mark(parameter: nn.Parameter) -> tuple[Tensor | None, int]:
    gradient = parameter.grad
    return gradient, 0 if gradient is None else gradient._version
