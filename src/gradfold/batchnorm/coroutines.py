"""Cooperative threads: functions that run in turns, each up to its next request, one thread at a time.

So process-wide state can be swapped with the turn, without locks. Threads rather than greenlets: grad mode, autocast,
dispatch keys and the like belong to a thread and would leak at each switch.
"""

from __future__ import annotations

import contextvars
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

import torch
from torch.autograd.graph import saved_tensors_hooks

from gradfold.batchnorm.global_state import GlobalState
from gradfold.batchnorm.torch_private import modes_of_this_thread, saved_tensor_hooks
from gradfold.messages import warn

Blocks: TypeAlias = "list[Callable[[], AbstractContextManager[Any]]]"

PATIENCE_S = 60.0  # without progress, until a warning
GRACE_S = 10.0  # for a canceled function to end by itself
_POLL_S = 1.0  # on some systems an interrupt is heard only between waits


class Canceled(BaseException):
    """Ends a function that is not to go on; no `except Exception` on the way catches it."""


class Coroutine:
    """One function in a thread of its own, which runs only while it has the turn; it calls `wait_for` of this."""

    def __init__(self, function: Callable[[Coroutine], Any], blocks: Blocks, number: int, process: GlobalState) -> None:
        self.request: Any = None  # what it waits with; None while it runs, and when it is done
        self.answer: Any = None  # what it gets for that
        self.result: Any = None
        self.is_done = False
        self._number = number
        self._process = process
        self._error: BaseException | None = None
        self._is_canceled = False
        self._turn: SimpleQueue[None] = SimpleQueue()  # an entry lets the function run
        self._pause: SimpleQueue[None] = SimpleQueue()  # an entry says that it waits or is done
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run, function, blocks), name="gradfold", daemon=True)

    def start(self) -> None:
        """Start the thread, which waits for its first turn."""
        self._thread.start()

    def advance(self) -> None:
        """Run it to its next request or its end; raises what the function raised."""
        self.request = None
        with self._process.turn(self._number):
            self._turn.put(None)
            self._wait_for_pause()
        self._process.num_ended += self.is_done
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait_for(self, request: Any) -> Any:
        """In the thread: end this turn with a request, and wait for the answer."""
        if self._is_canceled:
            raise Canceled
        self.request = request
        del request
        self._pause.put(None)
        self._turn.get()
        if self._is_canceled:
            raise Canceled
        answer, self.answer = self.answer, None
        return answer

    def cancel(self) -> None:
        """Let the function run no further than to its next request."""
        self._is_canceled = True
        self._turn.put(None)

    def join(self) -> None:
        """Wait until a canceled thread has ended; one that goes on for long is ended at its next line of Python."""
        with suppress(RuntimeError):  # it was not started, or an interrupt came in between: then it ends as it begins
            self._thread.join(GRACE_S)
        if self._thread.is_alive():
            ident = ctypes.c_ulong(self._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Canceled))
            self._thread.join(GRACE_S)  # one that waits for something else ends when that comes, and does nothing then

    def _wait_for_pause(self) -> None:
        """Wait until the turn ends, or an interrupt; warn once where there is no progress, which may be a deadlock."""
        last, since = None, time.monotonic()
        while True:
            try:
                return self._pause.get(timeout=min(_POLL_S, PATIENCE_S))
            except Empty:
                frame = sys._current_frames().get(self._thread.ident or 0)
            now = None if frame is None else (id(frame), frame.f_lasti)
            if now != last:
                last, since = now, time.monotonic()
            elif frame is not None and time.monotonic() - since >= PATIENCE_S:
                since = float("inf")
                while frame.f_back is not None and frame.f_globals.get("__name__") in ("threading", "queue"):
                    frame = frame.f_back
                warn(
                    f'with batch_norm="exact" a forward pass has been at {frame.f_code.co_filename}:{frame.f_lineno} '
                    f"for {PATIENCE_S:.0f} s, while those of other micro-batches wait for their turn. If it waits for "
                    "one of them (a lock around a BatchNorm, a barrier, a queue), it will never go on: interrupt it."
                )
            del frame  # it holds tensors

    def _run(self, function: Callable[[Coroutine], Any], blocks: Blocks) -> None:
        self._turn.get()
        # What makes torch tell OpenMP, which counts by thread, of torch.set_num_threads: else oneDNN would run
        # convolutions of each new thread on all cores, 100 times as slow where these are busy.
        torch.get_num_threads()
        try:
            with ExitStack() as stack:
                if not self._is_canceled:
                    for block in blocks:
                        stack.enter_context(block())
                    self.result = function(self)
        except Canceled:
            pass
        except BaseException as error:
            self._error = error
        finally:
            del function, blocks  # with all that they hold
            self.is_done = True
            self._pause.put(None)


@contextmanager
def coroutines(
    functions: Sequence[Callable[[Coroutine], Any]],
    device: torch.device,
    process: GlobalState,
    undo: list[Callable[[], object]],
) -> Iterator[list[Coroutine]]:
    """Coroutines of some functions, in order; at the end of the block all of their threads have ended.

    Before they start, what ends them is added to `undo`: an interrupt may come just before that end.
    """
    blocks = _thread_state(device)
    made = [Coroutine(function, blocks, number, process) for number, function in enumerate(functions)]
    undo.append(partial(_end, made))
    with process:  # canceled functions leave their blocks in any order, so the caller's state is restored after them
        try:
            for coroutine in made:
                coroutine.start()
            yield made
        finally:
            _end(made)


def _end(made: Sequence[Coroutine]) -> None:
    """Cancel those that are not done and wait for all, also if interrupted: they would work on a model rolled back."""
    interrupt: BaseException | None = None
    running = list(made)
    while running:
        try:
            for coroutine in running:
                coroutine.cancel()
            running[0].join()
            del running[0]
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _thread_state(device: torch.device) -> Blocks:
    """What torch keeps per thread and a new one has not, as blocks in which another thread has that of this one."""
    has_cache, hooks = torch.is_autocast_cache_enabled(), saved_tensor_hooks()
    blocks: Blocks = [partial(torch.set_grad_enabled, torch.is_grad_enabled())]
    for kind in {"cpu", device.type}:
        if torch.is_autocast_enabled(kind):
            blocks.append(partial(torch.autocast, kind, torch.get_autocast_dtype(kind), cache_enabled=has_cache))
    if device.type == "cuda":
        blocks.append(partial(torch.cuda.stream, torch.cuda.current_stream(device)))
    if hooks is not None:
        blocks.append(partial(saved_tensors_hooks, *hooks))
    return [*blocks, modes_of_this_thread()]
