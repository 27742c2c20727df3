"""The parent process of a diagnosis: the script runs in a child, so the report returns whatever the script does."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from gradfold.doctor.finding import Ending, Report
from gradfold.errors import OptionError

_GRACE_S = 20.0  # for a script whose time is over, and for what is left of one that was stopped


def diagnose(
    script: Path,
    arguments: Sequence[str] = (),
    *,
    num_updates: int = 8,
    timeout_s: float | None = None,
    stdout: IO[str] | None = None,
) -> Report:
    """Run a script under the doctor in a process of its own, until it has made so many updates, or its time is over.

    It has this process's standard streams, unless `stdout` is passed. Raises `OptionError` where there is no such file,
    or a number is out of range.
    """
    if not script.is_file():
        raise OptionError(f"{script} does not exist; expected a Python script, such as train.py.")
    if num_updates < 1:
        raise OptionError(f"--updates {num_updates}: expected at least 1.")
    if timeout_s is not None and timeout_s <= 0:
        raise OptionError(f"--timeout {timeout_s:g}: expected seconds above 0.")
    with tempfile.TemporaryDirectory(prefix="gradfold-doctor-") as folder:
        answer = Path(folder, "report.pickle")
        request = json.dumps([str(script), list(arguments), num_updates, timeout_s, str(answer)])
        with subprocess.Popen([sys.executable, "-m", "gradfold.doctor", request], stdout=stdout) as child:
            try:
                _wait(child, answer, timeout_s)
            finally:
                child.kill()
                child.wait()
        if answer.exists():
            report: Report = pickle.loads(answer.read_bytes())
            return report
        return Report(str(script), _ending_without_answer(child.returncode, timeout_s), (), {})


def _wait(child: subprocess.Popen[bytes], answer: Path, timeout_s: float | None) -> None:
    """Until the child ends; threads that a script left behind do not keep it for long."""
    deadline_s = math.inf if timeout_s is None else time.monotonic() + timeout_s + _GRACE_S
    while time.monotonic() < deadline_s:
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.1)
            return
        if answer.exists():
            deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)


def _ending_without_answer(code: int, timeout_s: float | None) -> Ending:
    if code == -9 and timeout_s is not None:
        return Ending("timed out", 0)
    if code < 0:
        return Ending("failed", 128 - code, f"ended by signal {-code}")
    return Ending("failed", code or 1, "the process ended before anything could be examined")
