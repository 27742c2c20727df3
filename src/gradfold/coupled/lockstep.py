"""Lock-step: functions that run in turns, each in a thread of its own, from one meeting of all to the next.

There is a strict baton: at any time either one of the threads runs, or the one that called them. So nothing here needs
a lock against the others, what the process has once for all threads can change hands with it, and whoever waits for the
threads is the thread that an interrupt reaches.

Threads rather than greenlets, since grad mode, autocast and the like belong to a thread and would leak at each switch.
"""

from __future__ import annotations

import contextvars
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from gradfold.coupled.process_state import Own, ProcessState
from gradfold.coupled.standstill import LOOKS_EVERY_S, Standstill

__all__: list[str] = []


class Stopped(BaseException):
    """Ends a thread whose function is not to go on; no `except Exception` on the way stops it."""


class Runner:
    """One function in a thread of its own, which runs only while it has the baton.

    Args:
        function: gets this runner, and calls its `meet`.
        state: what is on in the thread while the function runs.
        own: what of the process is on while it has the baton.
        threads: those with which it takes turns.

    Attributes:
        request: what it brought to the meeting at which it waits; None while it runs, and when it is done.
        answer: what it gets there.
        result: what the function returned.
        is_done: whether it has.
    """

    def __init__(
        self,
        function: Callable[[Runner], Any],
        state: Callable[[], AbstractContextManager[Any]],
        own: Own,
        threads: list[threading.Thread],
    ) -> None:
        self._own = own
        self._threads = threads
        self.request: Any = None
        self.answer: Any = None
        self.result: Any = None
        self.is_done = False
        self._error: BaseException | None = None
        self._is_stopped = False
        self._turn = _closed_gate()  # opens for the thread to run
        self._rest = _closed_gate()  # opens when it has come to a meeting, or to its end
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run, function, state), name="gradfold", daemon=True)
        threads.append(self._thread)
        self._thread.start()

    def advance(self) -> None:
        """Hand over the baton, and wait until it comes back; raises what the function raised."""
        self.request = None
        with self._own:
            self._turn.release()
            self._wait()
        self._own.is_done = self.is_done
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _wait(self) -> None:
        """Until the baton comes back, or an interrupt."""
        standstill: Standstill | None = None
        while not self._rest.acquire(timeout=LOOKS_EVERY_S):
            if standstill is None:
                standstill = Standstill(self._thread, [one for one in self._threads if one is not self._thread])
            standstill.look()

    def meet(self, request: Any) -> Any:
        """In the thread: hand the baton back with a request, and wait for the answer."""
        if self._is_stopped:
            raise Stopped
        self.request = request
        del request
        _open(self._rest)
        self._turn.acquire()
        if self._is_stopped:
            raise Stopped
        answer, self.answer = self.answer, None
        return answer

    def stop(self) -> None:
        """Let the function go no further than to its next meeting."""
        self._is_stopped = True
        _open(self._turn)

    def join(self) -> None:
        """Wait until the thread has ended; one that stands still, whatever it waits for, ends as soon as it moves."""
        standstill = Standstill(self._thread)
        while self._thread.is_alive():
            self._thread.join(LOOKS_EVERY_S)
            if standstill.is_still():
                ident = ctypes.c_ulong(self._thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Stopped))
                return

    def _run(self, function: Callable[[Runner], Any], state: Callable[[], AbstractContextManager[Any]]) -> None:
        self._turn.acquire()
        try:
            if not self._is_stopped:
                with state():
                    self.result = function(self)
        except Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            del function, state  # with all that they hold
            self.is_done = True
            _open(self._rest)


class Runners(Sequence[Runner]):
    """The runners of some functions, in order; at the end of the `with` block none of their threads is left."""

    def __init__(
        self,
        functions: Sequence[Callable[[Runner], Any]],
        state: Callable[[], AbstractContextManager[Any]],
        process: ProcessState,
    ) -> None:
        self._functions = functions
        self._state = state
        self._process = process
        self._runners: list[Runner] = []

    def __enter__(self) -> Runners:
        self._process.__enter__()
        try:
            threads: list[threading.Thread] = []
            for function in self._functions:
                self._runners.append(Runner(function, self._state, self._process.own(), threads))
        except BaseException:  # no more threads can be had, or an interrupt
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._end()
        finally:  # threads that were stopped have left their blocks in any order
            self._process.__exit__(kind, error, traceback)

    def __getitem__(self, index: Any) -> Any:
        return self._runners[index]

    def __len__(self) -> int:
        return len(self._runners)

    def __iter__(self) -> Iterator[Runner]:
        return iter(self._runners)

    def _end(self) -> None:
        """Stop those that are not done and wait for them, whatever comes in between."""
        interrupt: BaseException | None = None
        for runner in self._runners:
            runner.stop()
        for runner in self._runners:
            while True:
                try:
                    runner.join()
                    break
                except BaseException as error:  # a second interrupt: what still runs would work on a model rolled back
                    interrupt = error
        if interrupt is not None:
            raise interrupt


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate


def _open(gate: threading.Lock) -> None:
    """Open it; it may be open already, where an interrupt came in between."""
    try:
        gate.release()
    except RuntimeError:
        assert not gate.locked()
