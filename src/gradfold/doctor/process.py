"""The process of a diagnosis: a script runs in one of its own, so that whatever it does its report comes back."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from gradfold.doctor.diagnose import Report
from gradfold.doctor.run import Ending
from gradfold.errors import OptionError

__all__: list[str] = []

_GRACE_S = 20.0  # for a script whose time is over, and for what is left of one that was stopped


def diagnose(
    script: Path,
    arguments: Sequence[str] = (),
    *,
    num_updates: int = 8,
    timeout_s: float | None = None,
    stdout: IO[str] | None = None,
) -> Report:
    """Run a script under the doctor in a process of its own, with this one's standard streams.

    Args:
        script: the file.
        arguments: for its `sys.argv`.
        num_updates: how many updates to watch.
        timeout_s: when to end it; None for never.
        stdout: where its standard output goes; None for this process's own.

    Raises:
        OptionError: there is no such file, or a number is out of range.
    """
    if not script.is_file():
        raise OptionError(f"{script}: there is no such file; expected a Python script, such as train.py.")
    if num_updates < 1:
        raise OptionError(f"--updates {num_updates}: expected at least 1.")
    if timeout_s is not None and timeout_s <= 0:
        raise OptionError(f"--timeout {timeout_s:g}: expected seconds above 0.")
    with tempfile.TemporaryDirectory(prefix="gradfold-doctor-") as folder:
        answer = Path(folder, "report.json")
        request = {
            "script": str(script),
            "arguments": list(arguments),
            "num_updates": num_updates,
            "timeout_s": timeout_s,
            "answer": str(answer),
        }
        command = [sys.executable, "-m", "gradfold.doctor", json.dumps(request)]
        child = subprocess.Popen(command, stdout=stdout)
        try:
            _wait(child, answer, timeout_s)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if not answer.exists():
            return _without_answer(script, child.returncode, timeout_s)
        return Report.from_dict(json.loads(answer.read_text("utf-8")))


def _wait(child: subprocess.Popen[bytes], answer: Path, timeout_s: float | None) -> None:
    """Until the child ends; threads that a script left behind do not keep it for long."""
    start = time.monotonic()
    answered: float | None = None
    while True:
        try:
            child.wait(0.1)
            return
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        answered = now if answered is None and answer.exists() else answered
        if answered is not None and now - answered > _GRACE_S:
            return
        if timeout_s is not None and now - start > timeout_s + _GRACE_S:
            return


def _without_answer(script: Path, code: int, timeout_s: float | None) -> Report:
    if code == -9 and timeout_s is not None:
        ending = Ending("timed out", 0)
    elif code < 0:
        ending = Ending("failed", 128 - code, f"ended by signal {-code}")
    else:
        ending = Ending("failed", code or 1, "the process ended before anything could be examined")
    return Report(str(script), ending, (), {})
