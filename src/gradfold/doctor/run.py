"""A run: a script, run in this process as `__main__` under a watch, to its own end or until enough was seen."""

from __future__ import annotations

import _thread
import ctypes
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType

from gradfold.doctor.instrumentation import Guard, Patches
from gradfold.doctor.patches import patch_surroundings, patch_training
from gradfold.doctor.recorder import EnoughError, Recorder, Stop, TimedOutError

__all__: list[str] = []

_GRACE_S = 5.0  # between asking a script to end and ending its process


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        how: "ended" (by itself), "stopped" (enough was seen), "failed" (an exception, or an exit code of its own) or
            "timed out".
        code: the script's own exit code; 0 where it was stopped.
        error: the last line of its traceback, where it failed with one.
    """

    how: str
    code: int
    error: str = ""


@dataclass
class Run:
    """A script that was run, or is running.

    Attributes:
        script: the file.
        guard: between the doctor's own work and the script; knows whether the doctor failed.
        watch: over the script; None where it could not be made.
        ending: how it ended.
    """

    script: Path
    guard: Guard
    watch: Recorder | None = None
    ending: Ending = Ending("ended", 0)


def run(
    script: Path,
    arguments: Sequence[str],
    num_updates: int,
    timeout_s: float | None,
    on_last_moment: Callable[[Run], None],
) -> Run:
    """Run a script.

    Args:
        script: the file.
        arguments: for its `sys.argv`.
        num_updates: how many updates to watch.
        timeout_s: when to end it; None for never.
        on_last_moment: called instead of returning where the script ends the process itself (`os._exit`), or does not
            come back from what it does when its time is over.
    """
    stop, guard = Stop(num_updates), Guard()
    this, patches = Run(script, guard), Patches(guard)
    module = _main_module(script)
    before = sys.argv, sys.path[:], sys.modules.get("__main__")
    sys.argv = [str(script), *arguments]
    sys.path[0:1] = [str(script.resolve().parent)]
    sys.modules["__main__"] = module
    leave = os._exit
    own = os.getpid()

    def leave_after(code: int) -> None:
        if os.getpid() == own:
            this.ending = Ending("failed" if code else "ended", code)
            on_last_moment(this)
        leave(code)

    def end_hard(how: str) -> None:
        this.ending = Ending(how, 0)
        on_last_moment(this)
        sys.stdout.flush()
        sys.stderr.flush()
        leave(0)

    stop.on_swallowed = lambda: end_hard("stopped")
    timer = _Timer(timeout_s, lambda: end_hard("timed out"))
    try:
        os._exit = leave_after  # type: ignore[assignment]
        this.watch = guard.attempt("the beginning", _watch, script, stop, patches)
        timer.start()
        this.ending = _execute(script, module, stop)
    finally:
        timer.cancel()
        patches.undo()
        os._exit = leave
        sys.argv, sys.path[:] = before[0], before[1]
        if before[2] is not None:
            sys.modules["__main__"] = before[2]
    return this


def _watch(script: Path, stop: Stop, patches: Patches) -> Recorder:
    watch = Recorder(script, stop, patches.guard)
    patch_training(patches, watch)
    patch_surroundings(patches, watch)
    return watch


def _main_module(script: Path) -> ModuleType:
    module = ModuleType("__main__")
    module.__file__ = str(script)
    module.__dict__["__builtins__"] = __builtins__
    return module


def _execute(script: Path, module: ModuleType, stop: Stop) -> Ending:
    try:
        code = compile(script.read_bytes(), str(script), "exec")
        exec(code, module.__dict__)
    except TimedOutError:
        return Ending("timed out", 0)
    except EnoughError:
        return Ending("stopped", 0)
    except SystemExit as left:
        if stop.was_reached:
            return Ending("stopped", 0)
        return _left(left)
    except BaseException as error:
        if stop.was_reached:  # the script turned the stop into an error of its own
            return Ending("stopped", 0)
        _show(error)
        return Ending("failed", 130 if isinstance(error, KeyboardInterrupt) else 1, _last_line(error))
    return Ending("stopped" if stop.was_reached else "ended", 0)


def _left(left: SystemExit) -> Ending:
    """As Python ends a program: a number is the exit code, anything else is printed and is 1."""
    if left.code is None or left.code == 0:
        return Ending("ended", 0)
    if isinstance(left.code, int):
        return Ending("failed", left.code & 0xFF, f"SystemExit: {left.code}")
    sys.stderr.write(f"{left.code}\n")
    return Ending("failed", 1, f"SystemExit: {left.code}")


def _show(error: BaseException) -> None:
    """The traceback as Python prints it, without our own frames at its top."""
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)


def _last_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(type(error), error)).strip().splitlines()[-1]


class _Timer:
    """Ends the script from a thread of its own: by an exception in the main thread, and if that does not help, hard."""

    def __init__(self, timeout_s: float | None, end_hard: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._end_hard = end_hard
        self._done = threading.Event()
        self._main = _thread.get_ident()

    def start(self) -> None:
        """Begin to count."""
        if self._timeout_s is not None:
            threading.Thread(target=self._wait, name="gradfold-doctor-timeout", daemon=True).start()

    def cancel(self) -> None:
        """The script has ended."""
        self._done.set()

    def _wait(self) -> None:
        if self._done.wait(self._timeout_s):
            return
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._main), ctypes.py_object(TimedOutError))
        if self._done.wait(_GRACE_S):
            return
        self._end_hard()
