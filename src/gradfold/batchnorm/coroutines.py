"""Cooperative threads: functions that run in turns, each up to its next request, one thread at a time.

So process-wide state (random numbers, default dtype, determinism, back ends of attention) is swapped with the turn,
without locks: `torch.random.fork_rng`, `sdpa_kernel` and the like change it for a block, in which others get their
turn. Threads rather than greenlets: grad mode, autocast, dispatch keys and the like belong to a thread and would leak
at each switch.
"""

from __future__ import annotations

import contextvars
import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from gradfold.batchnorm.torch_private import modes_of_this_thread, saved_tensor_hooks
from gradfold.messages import warn
from gradfold.state.rng import RandomState
from gradfold.torch_private import PROCESS_SETTINGS, apply_settings, read_settings

Blocks: TypeAlias = "list[Callable[[], AbstractContextManager[Any]]]"
Function: TypeAlias = "Callable[[Coroutine], Any]"

PATIENCE_S = 60.0  # without progress, until a warning
GRACE_S = 10.0  # for a canceled function to end by itself
_POLL_S = 1.0  # on some systems an interrupt is heard only between waits


class Canceled(BaseException):
    """Ends a function that is not to go on; no `except Exception` on the way catches it."""


class GlobalState:
    """The state of the process in each forward pass; a `with` block restores the caller's at its end.

    Random numbers of the first forward pass go on with the caller's, those of others begin at seeds derived from them,
    since states that several pass on to each other cannot be forked. Where one ends before the next begins, they go on
    from each other.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({tensor.device: tensor for tensor in tensors}.values())  # random numbers of their devices
        self._began: dict[int, RandomState] = {}  # of each forward pass
        self._paused: dict[int, tuple[list[Any], RandomState]] = {}  # at the end of its last turn
        self._last_in_order = 0  # the last forward pass that began where all before it had ended
        self.num_ended = 0  # forward passes

    def __enter__(self) -> None:
        self._caller, self._settings = RandomState.record(self._tensors), read_settings(PROCESS_SETTINGS)

    def __exit__(self, *error: object) -> None:
        apply_settings(PROCESS_SETTINGS, self._settings)
        if not any(error) and self._paused:
            last = self._paused[self._last_in_order][1]
            are_unused = (random.is_same(self._began[number]) for number, (_, random) in self._paused.items())
            if last.is_same(self._caller) and not all(are_unused):
                last = self._caller.derived(len(self._paused))
            last.restore()

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """In this block one forward pass has its own state."""
        if number in self._paused:
            settings, random = self._paused[number]
            apply_settings(PROCESS_SETTINGS, settings)
            if random.has_moved():
                random.restore()
        else:
            if number == self.num_ended:
                self._last_in_order = number
            else:
                self._caller.derived(number).restore()
            self._began[number] = RandomState.record(self._tensors)
        try:
            yield
        finally:
            self._paused[number] = read_settings(PROCESS_SETTINGS), RandomState.record(self._tensors)
            apply_settings(PROCESS_SETTINGS, self._settings)


class Coroutine:
    """One function in a thread of its own, which runs only while it has the turn; it calls `wait_for` of this."""

    def __init__(self, function: Function, blocks: Blocks, number: int, process: GlobalState) -> None:
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
        self.thread = threading.Thread(target=run, args=(self._run, function, blocks), name="gradfold", daemon=True)

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
            self.thread.join(GRACE_S)
        if self.thread.is_alive():
            ident = ctypes.c_ulong(self.thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(Canceled))
            self.thread.join(GRACE_S)  # one that waits for something else ends when that comes, and does nothing then

    def _wait_for_pause(self) -> None:
        """Wait until the turn ends, or an interrupt; warn once where there is no progress, which may be a deadlock."""
        last, since = None, time.monotonic()
        while True:
            try:
                return self._pause.get(timeout=min(_POLL_S, PATIENCE_S))
            except Empty:
                frame = sys._current_frames().get(self.thread.ident or 0)
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

    def _run(self, function: Function, blocks: Blocks) -> None:
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
    functions: Sequence[Function], device: torch.device, tensors: Iterable[Tensor], undo: list[Callable[[], object]]
) -> Iterator[list[Coroutine]]:
    """Coroutines of some functions, in order; at the end of the block all of their threads have ended.

    Each has random numbers of its own on the devices of `tensors`, and the process-wide state that it left there.
    Before they start, what ends them is added to `undo`: an interrupt may come just before that end.
    """
    blocks, process = _thread_state(device), GlobalState(tensors)
    made = [Coroutine(function, blocks, number, process) for number, function in enumerate(functions)]
    undo.append(partial(apply_settings, PROCESS_SETTINGS, read_settings(PROCESS_SETTINGS)))
    undo.append(partial(_end, made))
    with process:  # canceled functions leave their blocks in any order, so the caller's state is restored after them
        try:
            for coroutine in made:
                coroutine.thread.start()  # it waits for its first turn
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
