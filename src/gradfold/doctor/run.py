"""A run: a script that runs in this process as `__main__` with hooks, to its own end or until enough was seen."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, TracebackType

from gradfold.doctor.backward_hooks import BackwardHooks
from gradfold.doctor.data_hooks import DataHooks
from gradfold.doctor.finding import Ending
from gradfold.doctor.instrumentation import Guard, Patches
from gradfold.doctor.optimizer_hooks import OptimizerHooks
from gradfold.doctor.recorder import Recorder
from gradfold.doctor.stop import Stop, TimedOutError

_GRACE_S = 5.0  # between asking a script to end and ending its process


@dataclass
class Run:
    """A script that was run, or is running."""

    script: Path
    guard: Guard  # knows whether the doctor failed
    recorder: Recorder | None = None  # None where it could not be made
    ending: Ending = field(default_factory=lambda: Ending("ended", 0))


def run(
    script: Path,
    arguments: Sequence[str],
    num_updates: int,
    timeout_s: float | None,
    on_last_moment: Callable[[Run], None],
) -> Run:
    """Run a script as `process.diagnose` says.

    Where the script ends the process itself (`os._exit`), or does not return when its time is over, `on_last_moment` is
    called instead of returning.
    """
    stop, guard = Stop(num_updates), Guard()
    this, patches = Run(script, guard), Patches(guard)
    leave, own_pid, is_over = os._exit, os.getpid(), threading.Event()

    def leave_after(code: int) -> None:
        if os.getpid() == own_pid:
            this.ending = Ending("failed" if code else "ended", code)
            on_last_moment(this)
        leave(code)

    def end_process(how: str) -> None:
        this.ending = Ending(how, 0)
        on_last_moment(this)
        sys.stdout.flush()
        sys.stderr.flush()
        leave(0)

    stop.on_caught = partial(end_process, "stopped")
    with _main_module(script, arguments) as module:
        try:
            os._exit = leave_after  # type: ignore[assignment]
            this.recorder = guard.attempt("the beginning", record, script, stop, patches)
            if timeout_s is not None:
                wait = (timeout_s, is_over, threading.get_ident(), partial(end_process, "timed out"))
                threading.Thread(target=_end_after, args=wait, name="gradfold-doctor-timeout", daemon=True).start()
            this.ending = _execute(script, module, stop)
        finally:
            is_over.set()
            patches.close()
            os._exit = leave
    return this


def record(script: Path, stop: Stop, patches: Patches) -> Recorder:
    """A recorder that torch's functions report to until the patches are closed."""
    recorder = Recorder(script, stop, patches.guard)
    for hooks in (BackwardHooks, OptimizerHooks, DataHooks):
        hooks(recorder, patches)
    return recorder


@contextmanager
def _main_module(script: Path, arguments: Sequence[str]) -> Iterator[ModuleType]:
    """An empty `__main__`, with the script's arguments and folder, as Python has it for a program."""
    module = ModuleType("__main__")
    module.__file__ = str(script)
    module.__dict__["__builtins__"] = __builtins__
    before = sys.argv, sys.path[:], sys.modules["__main__"]
    sys.argv = [str(script), *arguments]
    sys.path[0:1] = [str(script.resolve().parent)]
    sys.modules["__main__"] = module
    try:
        yield module
    finally:
        sys.argv, sys.path[:], sys.modules["__main__"] = before


def _execute(script: Path, module: ModuleType, stop: Stop) -> Ending:
    try:
        exec(compile(script.read_bytes(), str(script), "exec"), module.__dict__)
        return Ending("stopped" if stop.was_reached else "ended", 0)
    except TimedOutError:
        return Ending("timed out", 0)
    except BaseException as error:  # the stop, or what the script made of it
        return Ending("stopped", 0) if stop.was_reached else _ending_of(error)


def _ending_of(error: BaseException) -> Ending:
    """As Python ends a program: a number is the exit code, anything else is printed and is 1."""
    if not isinstance(error, SystemExit):
        _show(error)
        last_line = "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[-1]
        return Ending("failed", 130 if isinstance(error, KeyboardInterrupt) else 1, last_line)
    if error.code is None or error.code == 0:
        return Ending("ended", 0)
    if isinstance(error.code, int):
        return Ending("failed", error.code & 0xFF, f"SystemExit: {error.code}")
    sys.stderr.write(f"{error.code}\n")
    return Ending("failed", 1, f"SystemExit: {error.code}")


def _show(error: BaseException) -> None:
    """The traceback as Python prints it, without our own frames at its top."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)


def _end_after(timeout_s: float, is_over: threading.Event, thread: int, end_process: Callable[[], None]) -> None:
    """End the script in a thread from another one: by an exception, and if that does not help, with its process."""
    if is_over.wait(timeout_s):
        return
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(TimedOutError))
    if not is_over.wait(_GRACE_S):
        end_process()
