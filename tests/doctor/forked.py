"""A script under the doctor in a fork of a process that has torch imported: cheap enough for a hundred of them."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import torch
from processes import CONTEXT

import gradfold.doctor.run
from gradfold.doctor.diagnose import diagnose_run
from gradfold.doctor.finding import Report
from gradfold.doctor.run import Run, run


def expected(script: Path) -> set[str]:
    """The codes in a script's first line: `# expect: GF001 GF004` or `# expect: nothing`."""
    first = script.read_text("utf-8").splitlines()[0]
    match = re.fullmatch(r"# expect: (nothing|GF\d{3}(?: GF\d{3})*)", first)
    assert match, f"{script}: the first line is {first!r}"
    return set() if match[1] == "nothing" else set(match[1].split())


def arguments(script: Path) -> list[str]:
    """Those in a script's line `# args: --lr 0.1`."""
    found = re.search(r"^# args: (.*)$", script.read_text("utf-8"), re.MULTILINE)
    return shlex.split(found[1]) if found else []


def diagnose(
    script: Path, *, num_updates: int = 8, timeout_s: float = 100.0, grace_s: float = 5.0
) -> tuple[Report, str]:
    """What the doctor says of a script, and what the script printed.

    Time is over when the script writes a file "out of time", however fast the machine is.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = CONTEXT.Process(target=_run, args=(script, num_updates, timeout_s, grace_s, folder))
        process.start()
        process.join(timeout_s + grace_s + 20)
        process.kill()
        printed = Path(folder, "printed").read_text("utf-8", errors="replace")
        answer = Path(folder, "answer")
        assert answer.exists(), printed
        return pickle.loads(answer.read_bytes()), printed


def _run(script: Path, num_updates: int, timeout_s: float, grace_s: float, folder: str) -> None:
    output = os.open(Path(folder, "printed"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(folder)
    torch.set_num_threads(1)
    gradfold.doctor.run._GRACE_S = grace_s

    class Deadline(threading.Event):
        def wait(self, seconds: float | None = None) -> bool:
            if seconds != timeout_s:
                return super().wait(seconds)
            while not Path(folder, "out of time").exists():
                if super().wait(0.01):
                    return True
            return False

    threading.Event = Deadline

    def write(this: Run) -> None:
        Path(folder, "answer").write_bytes(pickle.dumps(diagnose_run(this)))

    try:
        write(run(script, arguments(script), num_updates, timeout_s, write))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # not this process's own handlers
