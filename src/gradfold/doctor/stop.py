"""The stop: when enough of a script was seen, and the exceptions that end it from inside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from gradfold.doctor.events import EpochStart, EventLog, Step

_FURTHER = 4  # times as far as the updates asked for, to see an epoch end
_MOST_CAUGHT = 20


class EnoughError(BaseException):
    """Ends the script from inside. Not an `Exception`, so scripts that catch those let it through. Internal."""


class TimedOutError(EnoughError):
    """Ends a script that ran past its time. Internal."""


class Stop:
    """Ends a script after some updates, or later to see the end of its epoch if that is near."""

    def __init__(self, num_updates: int) -> None:
        self.num_updates = num_updates
        self.was_reached = False  # whether enough was seen
        self.on_caught: Callable[[], None] | None = None  # where the script catches the stop again and again
        self._num_backwards_then = 0  # when the updates asked for were seen
        self._num_raised = 0

    def check(self, log: EventLog) -> None:
        """Raise where enough was seen. Called when a backward pass begins: what follows a step was seen by then."""
        if self.was_reached or self._is_enough(log):
            self.was_reached = True
            self._num_raised += 1
            if self._num_raised > _MOST_CAUGHT and self.on_caught is not None:
                self.on_caught()
            raise EnoughError

    def _is_enough(self, log: EventLog) -> bool:
        counts = Counter(step.optimizer for step in log.of(Step)).values()
        if not counts or (min(counts) < self.num_updates and max(counts) < _FURTHER * self.num_updates):
            return False
        num_backwards = len(log.backwards)
        then = self._num_backwards_then = self._num_backwards_then or num_backwards
        if num_backwards >= 2 * _FURTHER * then:
            return True
        is_far = num_backwards >= _FURTHER * then
        loader = log.backwards[-1].loader_state.loader
        if loader is None:
            return is_far or self._has_seen_outer_loop_advance(log)
        starts = [one for one in log.of(EpochStart) if one.loader == loader]
        if len(starts) > 1:
            return _num_steps_of_epoch(log) >= 2  # the second epoch's first window, and one that is as all others
        length = starts[-1].length
        return is_far or (length is not None and length > _FURTHER * then)

    def _has_seen_outer_loop_advance(self, log: EventLog) -> bool:
        """Whether an outer loop of the user's began its next iteration, two updates ago or more."""
        outer = [one.context.loops[:-1] for one in log.backwards]
        changed = [index for index in range(1, len(outer)) if outer[index] != outer[index - 1]]
        return bool(changed) and len(outer) - changed[0] >= self._num_backwards_then // self.num_updates * 2


def _num_steps_of_epoch(log: EventLog) -> int:
    """How many steps were made since a loader began another epoch, counted to 2."""
    loaders: set[int] = set()
    start = 0
    for one in log.of(EpochStart):
        start = one.at if one.loader in loaders else start
        loaders.add(one.loader)
    return sum(step.at > start for step in log.of(Step)[-2:])
