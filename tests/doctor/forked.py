"""A script under the doctor in a fork of a process that has torch imported: cheap enough for a hundred of them."""

from __future__ import annotations

import os
import pickle
import re
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  # what the first optimizer of a process imports, in seconds

from gradfold.doctor.examine import Report, examine
from gradfold.doctor.run import run


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


def diagnose(script: Path, *, num_updates: int = 8, timeout_s: float = 60) -> tuple[Report, str]:
    """What the doctor says of a script, and what the script printed."""
    with tempfile.TemporaryDirectory() as folder:
        answer, printed = Path(folder, "answer"), Path(folder, "printed")
        child = os.fork()
        if child == 0:
            _run(script, num_updates, timeout_s, answer, printed)
        os.waitpid(child, 0)
        text = printed.read_text("utf-8", errors="replace")
        assert answer.exists(), text
        return pickle.loads(answer.read_bytes()), text


def _run(script: Path, num_updates: int, timeout_s: float, answer: Path, printed: Path) -> None:
    try:
        output = os.open(printed, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(answer.parent)
        torch.manual_seed(0)

        def last(watch: object, ending: object) -> None:
            raise AssertionError(ending)

        watch, ending, seconds = run(script, arguments(script), num_updates, timeout_s, last)
        answer.write_bytes(pickle.dumps(examine(script, watch, ending, seconds)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
