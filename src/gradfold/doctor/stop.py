"""The stop: when enough of a script was seen, and how it is ended."""

from __future__ import annotations

from collections.abc import Callable

from gradfold.doctor.events import Tape

__all__: list[str] = []

_FURTHER = 4  # times as far as the updates asked for, to see an epoch end
_MOST_SWALLOWED = 20


class EnoughError(BaseException):
    """Ends the script from inside. No `Exception`, so that scripts that catch theirs let it through. Internal."""


class TimedOutError(EnoughError):
    """Ends a script that ran past its time. Internal."""


class Stop:
    """Counts updates and passes over the data.

    Args:
        num_updates: how many updates to watch.

    Attributes:
        was_reached: whether the script was ended for having been seen enough.
        on_swallowed: called where the script catches the stop again and again; it ends the process.
    """

    def __init__(self, num_updates: int) -> None:
        self.num_updates = num_updates
        self.was_reached = False
        self.on_swallowed: Callable[[], None] | None = None
        self._steps: dict[int, int] = {}
        self._num_passes: dict[int, int] = {}
        self._lengths: dict[int, int | None] = {}
        self._steps_since_pass = 0
        self._backwards_then = 0
        self._num_raised = 0

    def note_step(self, ledger: int) -> None:
        """An optimizer made a step."""
        self._steps[ledger] = self._steps.get(ledger, 0) + 1
        self._steps_since_pass += 1

    def note_pass(self, loader: int, length: int | None) -> None:
        """A pass over a loader begins."""
        self._num_passes[loader] = self._num_passes.get(loader, 0) + 1
        self._lengths[loader] = length
        if self._num_passes[loader] > 1:
            self._steps_since_pass = 0

    def check(self, tape: Tape) -> None:
        """Raise where enough was seen; called when a backward pass begins, so that what follows a step was seen."""
        if self.was_reached or self._is_enough(tape):
            self.was_reached = True
            self._num_raised += 1
            if self._num_raised > _MOST_SWALLOWED and self.on_swallowed is not None:
                self.on_swallowed()
            raise EnoughError

    def _is_enough(self, tape: Tape) -> bool:
        counts = self._steps.values()
        if not counts or (min(counts) < self.num_updates and max(counts) < _FURTHER * self.num_updates):
            return False
        num_backwards = len(tape.backwards)
        self._backwards_then = self._backwards_then or num_backwards
        if num_backwards >= 2 * _FURTHER * self._backwards_then:
            return True
        loader = tape.backwards[-1].loader
        if loader is None:
            return self._has_seen_turn(tape) or num_backwards >= _FURTHER * self._backwards_then
        if self._num_passes.get(loader, 0) > 1:
            return self._steps_since_pass >= 2  # the second pass's first window, and one that is as all others
        length = self._lengths.get(loader)
        return num_backwards >= _FURTHER * self._backwards_then or (
            length is not None and length > _FURTHER * self._backwards_then
        )

    def _has_seen_turn(self, tape: Tape) -> bool:
        """Whether an outer loop of the user's went on to its next pass, two updates ago or more."""
        turns = [one.turns[:-1] for one in tape.backwards]
        changed = [index for index in range(1, len(turns)) if turns[index] != turns[index - 1]]
        return bool(changed) and len(turns) - changed[0] >= self._backwards_then // self.num_updates * 2
