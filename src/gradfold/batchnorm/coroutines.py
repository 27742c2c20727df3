"""Lock-step: functions that run in turns, each in a thread of its own, from one meeting of all to the next.

There is a strict baton: at any time either one of the threads runs, or the one that called them. So nothing here needs
a lock against the others, what the process has once for all threads can change hands with it, and whoever waits for the
threads is the thread that an interrupt reaches.

Threads rather than greenlets, since grad mode, autocast and the like belong to a thread and would leak at each switch.

A standstill: a forward pass that has the baton waits for what one holds that waits for the baton. Neither goes on.

A lock that is held around a BatchNorm does this: the first micro-batch holds it while it waits for the others. It is
looked for only where a thread has used no time for ten seconds: by then the frame that waits enters a block, names the
lock, which is held, and a frame of a thread that rests names it, too. Who holds it is known of locks that can be taken
again; of others nobody knows, and one that a third thread holds for so long is taken for it.

The state of a thread: what torch keeps for each thread by itself, taken from one and put on in another.

A new thread begins with grad mode on, no autocast, the default device, no modes and no hooks on saved tensors, whatever
is on in the thread that made it. torch's default dtype, number of threads, generators and determinism are the
process's.
"""

from __future__ import annotations

import contextvars
import ctypes
import dis
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _push_mode as _push_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode

from gradfold.batchnorm.global_state import CoroutineState, GlobalState
from gradfold.errors import BatchNormError
from gradfold.messages import warn

__all__: list[str] = []

LOOKS_EVERY_S = 1.0
_LOOKS_OF_A_STANDSTILL = 10
_WARNS_AFTER = 60  # looks

_WAITING = frozenset({"threading", "queue"})  # modules of Python whose frames wait for somebody else's lock
_LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Semaphore, threading.Condition)


class DeadlockDetector:
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


class Cancelled(BaseException):
    """Ends a thread whose function is not to go on; no `except Exception` on the way stops it."""


class Coroutine:
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
        function: Callable[[Coroutine], Any],
        state: Callable[[], AbstractContextManager[Any]],
        own: CoroutineState,
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
        standstill: DeadlockDetector | None = None
        while not self._rest.acquire(timeout=LOOKS_EVERY_S):
            if standstill is None:
                standstill = DeadlockDetector(self._thread, [one for one in self._threads if one is not self._thread])
            standstill.look()

    def meet(self, request: Any) -> Any:
        """In the thread: hand the baton back with a request, and wait for the answer."""
        if self._is_stopped:
            raise Cancelled
        self.request = request
        del request
        _open(self._rest)
        self._turn.acquire()
        if self._is_stopped:
            raise Cancelled
        answer, self.answer = self.answer, None
        return answer

    def stop(self) -> None:
        """Let the function go no further than to its next meeting."""
        self._is_stopped = True
        _open(self._turn)

    def join(self) -> None:
        """Wait until the thread has ended; one that stands still, whatever it waits for, ends as soon as it moves."""
        standstill = DeadlockDetector(self._thread)
        while self._thread.is_alive():
            self._thread.join(LOOKS_EVERY_S)
            if standstill.is_still():
                ident = ctypes.c_ulong(self._thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Cancelled))
                return

    def _run(self, function: Callable[[Coroutine], Any], state: Callable[[], AbstractContextManager[Any]]) -> None:
        self._turn.acquire()
        try:
            if not self._is_stopped:
                with state():
                    self.result = function(self)
        except Cancelled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            del function, state  # with all that they hold
            self.is_done = True
            _open(self._rest)


class Coroutines(Sequence[Coroutine]):
    """The runners of some functions, in order; at the end of the `with` block none of their threads is left."""

    def __init__(
        self,
        functions: Sequence[Callable[[Coroutine], Any]],
        state: Callable[[], AbstractContextManager[Any]],
        process: GlobalState,
    ) -> None:
        self._functions = functions
        self._state = state
        self._process = process
        self._runners: list[Coroutine] = []

    def __enter__(self) -> Coroutines:
        self._process.__enter__()
        try:
            threads: list[threading.Thread] = []
            for function in self._functions:
                self._runners.append(Coroutine(function, self._state, self._process.own(), threads))
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

    def __iter__(self) -> Iterator[Coroutine]:
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


Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


class ThreadState:
    """What is on in the thread that makes it.

    Args:
        device: where the model is, whose stream the other threads are to use as well.

    Attributes:
        hooks: on saved tensors, the innermost pair; None where there are none.
    """

    def __init__(self, device: torch.device) -> None:
        self._has_grad = torch.is_grad_enabled()
        self._autocasts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in {"cpu", device.type}
        ]
        self._has_autocast_cache = torch.is_autocast_cache_enabled()
        self._function_modes: list[TorchFunctionMode] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # default device included
        self._dispatch_modes: list[TorchDispatchMode] = _get_current_dispatch_mode_stack()
        self.hooks: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Put it on in another thread."""
        # What makes torch tell OpenMP, which counts by thread, of torch.set_num_threads: else oneDNN would run
        # convolutions of each new thread on all cores, 100 times as slow where these are busy.
        torch.get_num_threads()
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self._has_grad))
            for kind, dtype, is_enabled in self._autocasts:
                if is_enabled:
                    stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self._has_autocast_cache))
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            if self.hooks is not None:
                stack.enter_context(saved_tensors_hooks(*self.hooks))
            for dispatch_mode in self._dispatch_modes:
                _push_dispatch_mode(dispatch_mode)
                stack.callback(_pop_dispatch_mode)
            for function_mode in self._function_modes:
                _push_function_mode(function_mode)  # type: ignore[no-untyped-call]
                stack.callback(_pop_function_mode)
            yield
