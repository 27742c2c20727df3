"""A standstill: a forward pass that has the baton waits for what one holds that waits for the baton. Neither goes on.

A lock that is held around a BatchNorm does this: the first micro-batch holds it while it waits for the others. It is
looked for only where a thread has used no time for ten seconds: by then the frame that waits enters a block, names the
lock, which is held, and a frame of a thread that rests names it, too. Who holds it is known of locks that can be taken
again; of others nobody knows, and one that a third thread holds for so long is taken for it.
"""

from __future__ import annotations

import dis
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from types import FrameType
from typing import Any

from gradfold.errors import BatchNormError
from gradfold.warning import warn

__all__: list[str] = []

LOOKS_EVERY_S = 1.0
_LOOKS_OF_A_STANDSTILL = 10
_WARNS_AFTER = 60  # looks

_WAITING = frozenset({"threading", "queue"})  # modules of Python whose frames wait for somebody else's lock
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Semaphore, threading.Condition)


class Standstill:
    """Looks at a thread that is being waited for.

    Args:
        running: the thread.
        resting: those that wait for their turn; the thread that looks waits, too.
    """

    def __init__(self, running: threading.Thread, resting: Sequence[threading.Thread] = ()) -> None:
        self._running = running
        self._resting = resting
        self._before: object = None
        self._num_looks = 0  # since it has last moved

    def look(self) -> None:
        """Look once more; every second or so.

        Raises:
            BatchNormError: it waits for a lock that a resting thread holds.
        """
        frame = sys._current_frames().get(self._running.ident or 0)
        if frame is None or not self.is_still(frame):
            return
        waiting = _first_outside(frame)
        if waiting is not frame or _is_acquiring(frame):
            self._accuse(waiting)
        if self._num_looks == _WARNS_AFTER:
            warn(
                f"a forward pass stands still at {_place(waiting)} while those of other micro-batches wait for their "
                'turn (batch_norm="exact"). If it waits for one of them (a barrier, a queue, an event), it will never '
                "go on: interrupt it."
            )

    def is_still(self, frame: FrameType | None = None) -> bool:
        """Whether it has not moved for some looks, of which this is one."""
        frame = frame or sys._current_frames().get(self._running.ident or 0)
        now = None if frame is None else (id(frame), frame.f_lasti, _time_used(self._running))
        self._num_looks = self._num_looks + 1 if now == self._before else 0
        self._before = now
        return self._num_looks >= _LOOKS_OF_A_STANDSTILL

    def _accuse(self, waiting: FrameType) -> None:
        held = {id(lock) for _, lock in _locks_named_in(waiting) if _is_held(lock)}
        for thread in (*self._resting, threading.current_thread()):
            for name, lock in chain.from_iterable(map(_locks_named_in, _frames_of(thread))):
                if id(lock) in held and _owner(lock) in (None, thread.ident):
                    raise _refused(name, waiting, is_by_caller=thread is threading.current_thread())


def _time_used(thread: threading.Thread) -> int:
    """By this thread on processors; 0 where the system does not say."""
    if not hasattr(time, "pthread_getcpuclockid") or thread.ident is None:
        return 0
    return time.clock_gettime_ns(time.pthread_getcpuclockid(thread.ident))


def _first_outside(frame: FrameType) -> FrameType:
    while frame.f_back is not None and frame.f_globals.get("__name__") in _WAITING:
        frame = frame.f_back
    return frame


def _is_acquiring(frame: FrameType) -> bool:
    """Whether what it does is to enter a block or to call `acquire`, and not something else within such a block."""
    done = [one for one in dis.get_instructions(frame.f_code) if one.offset <= frame.f_lasti]
    if done[-1].opname == "BEFORE_WITH":
        return True
    names = {str(one.argval) for one in done[-8:]} | {one.argrepr for one in done[-8:]}
    return done[-1].opname.startswith("CALL") and bool({"acquire", "__enter__"} & names)


def _frames_of(thread: threading.Thread) -> Iterator[FrameType]:
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _locks_named_in(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """Locks in variables of a function, in globals that it names, and in attributes of both that it names."""
    if frame.f_globals.get("__name__", "").split(".")[0] == "gradfold":
        return  # what looks has the locks in its hands
    names = frame.f_code.co_names
    variables = {**{name: frame.f_globals[name] for name in names if name in frame.f_globals}, **frame.f_locals}
    for name, value in variables.items():
        if isinstance(value, _LOCKS):
            yield name, value
        attributes = getattr(value, "__dict__", {})
        for attribute in names:
            found = attributes.get(attribute)
            if isinstance(found, _LOCKS):
                yield f"{name}.{attribute}", found


def _is_held(lock: Any) -> bool:
    if hasattr(lock, "_is_owned") and lock._is_owned():  # by the thread that looks, which could take it again
        return True
    if lock.acquire(blocking=False):
        lock.release()
        return False
    return True


def _owner(lock: Any) -> int | None:
    """The thread that holds a lock, of the kinds that tell."""
    found = re.search(r"owner=(\d+)", repr(getattr(lock, "_lock", lock)))
    return int(found[1]) if found else None


def _refused(lock: str, waiting: FrameType, is_by_caller: bool) -> BatchNormError:
    holder = (
        "the caller of accumulator.backward() holds. Forward passes run in threads of their own there, for which a "
        "lock that can be taken again by its own thread is taken. Let go of it around accumulator.backward()"
        if is_by_caller
        else "the forward pass of another micro-batch holds. That one waits at a BatchNorm until all have come, so "
        "that neither would ever go on. Hold the lock around parts of the model without BatchNorm"
    )
    return BatchNormError(
        f'in batch_norm="exact" a forward pass waits for the lock {lock!r} at {_place(waiting)}, which {holder}; or '
        'use batch_norm="per_micro_batch".',
        (),
    )


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
