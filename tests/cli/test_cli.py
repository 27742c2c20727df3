"""The command line: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from full_disk import text_file
from rich.console import Console
from typer.testing import CliRunner

import gradfold
import gradfold.__main__
import gradfold.cli
import gradfold.cli.options
from gradfold.cli.tables import showing_progress
from gradfold.compare import ArmProgress
from gradfold.compare.arms import ARMS
from gradfold.errors import OptionError
from gradfold.workloads import registry

TINY = str(Path(__file__).parents[1] / "compare" / "test_compare.py") + ":tiny"
FAULTY = TINY.replace(":tiny", ":faulty")


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`gradfold` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "gradfold", *arguments], capture_output=True, text=True, check=False, **options
    )


def in_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`gradfold` in this process, as the console script runs it: its exit code."""
    monkeypatch.setattr("sys.argv", ["gradfold", *arguments])
    with pytest.raises(SystemExit) as end:
        gradfold.__main__.main()
    return int(end.value.code or 0)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let programs started here hear Ctrl-C, although shells make what they run in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_compare_from_start_to_end(tmp_path: Path) -> None:
    out = tmp_path / "a new folder" / "out"
    arms = ["full-batch", "gradfold"]  # all four cost seconds to start; test_compare.py has them in one process
    options = ["--out", str(out), "--threads", "1", "--seed", "3", "--epochs", "1", "--arms", ",".join(arms)]
    ended = program("compare", TINY, "--json", "--precision", "bf16", *options)
    assert (ended.returncode, ended.stderr) == (0, "")
    results = json.loads(ended.stdout)
    assert results == json.loads((out / "results.json").read_text("utf-8"))
    lower = ["full-batch-bf16", "gradfold-bf16"]
    assert results["settings"]["precision"] == "bf16" and results["settings"]["arms"] == [*arms, *lower]
    assert results["settings"]["seed"] == 3 and results["sizes"]["num_epochs"] == 1
    assert results["command_line"].startswith("gradfold compare ") and "--seed 3" in results["command_line"]
    assert results["versions"]["torch"] and results["machine"]["cores"] == os.cpu_count()

    rows = {row["arm"]: row for row in results["rows"]}
    assert list(rows) == [*arms, *lower]
    assert {row["status"] for row in rows.values()} == {"finished"}
    error = {arm: row["deviations"]["gradient_float64"]["value"] for arm, row in rows.items()}
    assert error["full-batch"] == 0.0 and error["gradfold"] < 1e-12
    for arm in lower:
        assert rows[arm]["deviations"]["gradient_float32"]["value"] > 1e-5 and error[arm] < 1e-12
        assert rows[arm]["measured"]["seconds"]["forward"] > 0 and rows[arm]["measured"]["seconds"]["backward"] > 0
    assert {row["measured"]["num_threads"] for row in rows.values()} == {1}
    assert rows["gradfold"]["measured"]["metrics"] == {"accuracy": 0.5}
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "results.json", "overview.png", "loss.png"} <= names


@pytest.mark.slow
def test_compare_in_an_ascii_locale_with_names_that_are_not_utf_8(users_file: Path, tmp_path: Path) -> None:
    with users_file.open("a", encoding="utf-8") as file:
        file.write("\nprint('printed: \u2022 \\udcff')\n")  # in the process of an arm, too
    out = os.fsencode(tmp_path) + b"/za\xc5\xbc\xff"
    locale = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = ["--arms", "full-batch", "--threads", "1", "--out", os.fsdecode(out)]
    ended = program("compare", f"{users_file}:linear", *arguments, env={**os.environ, **locale})
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "printed: \\u2022 \\udcff" in ended.stdout and "za\\udcc5\\udcbc\\udcff/report.html" in ended.stdout
    assert {os.fsdecode(name) for name in os.listdir(out)} >= {"report.html", "results.json", "loss.png"}  # noqa: PTH208


@pytest.mark.slow
def test_a_failed_arm_ends_with_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = in_process(monkeypatch, "compare", FAULTY, "--arms", "plain-loop", "--threads", "1")
    printed = capsys.readouterr()
    assert code == 1
    assert "plain-loop failed: LookupError: the first line." in printed.out
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", TINY, "--arms", "spiral"], "unknown arms: 'spiral'; the arms are full-batch, gradfold"),
        (["compare", TINY, "--global-batch", "99"], "a global batch of 99 is larger than the data"),
        (["compare", TINY, "--micro-batch", "9"], "a micro-batch of 9 is larger than the global batch of 8"),
        (["compare", TINY, "--epochs", "0"], "--epochs 0: expected at least 1"),
        (["compare", TINY, "--precision", "fp8"], "--precision fp8: expected bf16 or fp16"),
        (["compare", "digitz"], "Did you mean 'digits'?"),
        (["compare", TINY, "--out", __file__], "--out"),
        (["compare", TINY, "--epochs", "many"], "--epochs"),
        (["compute"], "compute"),
        (["verify", TINY, "--nproc", "1000000"], "--nproc 1000000: expected at most"),
        (["compare", TINY, "--nproc", "999"], "--nproc 999: expected at most"),
    ],
)
def test_wrong_usage_ends_with_two_and_a_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = in_process(monkeypatch, *arguments)
    printed = capsys.readouterr()
    assert code == 2
    assert message in printed.err and "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.slow
def test_ctrl_c_ends_the_child_too(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    environment = {**os.environ, "PID_FILE": str(pid_file), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "gradfold", "compare", TINY.replace(":tiny", ":endless")]
    with interruptible():
        parent = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        while not (pid_file.exists() and pid_file.read_text()):
            assert parent.poll() is None
            time.sleep(0.02)
        child = int(pid_file.read_text())
        parent.send_signal(signal.SIGINT)
        printed, errors = parent.communicate(timeout=30)
    finally:
        parent.kill()
    assert parent.returncode == 130
    assert (printed, errors.strip()) == ("", "gradfold: interrupted")
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor")}  # torch's own
    assert left == {"pid"}  # no tensors are left behind


USERS_FILE = """
import argparse, dataclasses, sys
from functools import partial
import torch
from gradfold import Workload

def linear(make_model=partial(torch.nn.Linear, 2, 1), loss_fn=lambda model, x: model(x).square().mean()):
    return Workload("linear", "\u2022 \udcff", make_model, loss_fn, partial(torch.optim.SGD, lr=0.1),
                    torch.ones(6, 2), global_batch_size=6, micro_batch_size=2, num_epochs=1)

def ends(*_):
    sys.exit(7)  # line 11

def interrupts(*_):
    raise KeyboardInterrupt

def built_by_an_end():
    return ends()

def model_that_ends():
    return linear(make_model=ends)

def loss_that_ends():
    return linear(loss_fn=ends)

def arguments():
    argparse.ArgumentParser().parse_args(["--learning-rate", "0.1"])  # line 26

def cancelled():
    import asyncio
    raise asyncio.CancelledError  # line 30

def interrupted_model():
    return linear(make_model=interrupts)

def interrupted_loss():
    return linear(loss_fn=interrupts)
"""


@pytest.fixture
def users_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(USERS_FILE.lstrip("\n").replace("\udcff", "\\udcff"), "utf-8")
    return path


@pytest.mark.parametrize("command", [["verify"], ["plan", "--memory", "1GiB"]])
@pytest.mark.parametrize(
    ("function", "line", "error"),
    [
        ("built_by_an_end", 11, "SystemExit: 7"),
        ("model_that_ends", 11, "SystemExit: 7"),
        ("loss_that_ends", 11, "SystemExit: 7"),
        ("arguments", 26, "SystemExit: 2"),
        ("cancelled", 30, "CancelledError"),
    ],
)
def test_a_workload_that_ends_the_program_is_named(
    users_file: Path,
    command: list[str],
    function: str,
    line: int,
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = in_process(monkeypatch, *command, f"{users_file}:{function}")
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    last = printed.err.splitlines()[-1]  # argparse prints its usage first
    assert last.startswith("gradfold: ") and f"{error} ({users_file}, line {line})" in last


def test_a_file_that_ends_the_program_while_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.py"
    path.write_text("def f(): ...\nraise SystemExit('no data')\n")
    assert in_process(monkeypatch, "verify", f"{path}:f") == 2
    printed = capsys.readouterr().err
    assert f"{path}:f: cannot import {path}: SystemExit: no data ({path}, line 2)" in printed


@pytest.mark.parametrize("command", [["verify"], ["plan", "--memory", "1GiB"]])
@pytest.mark.parametrize("function", ["interrupted_model", "interrupted_loss"])
def test_ctrl_c_ends_every_command_with_one_line(
    users_file: Path,
    command: list[str],
    function: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with interruptible():
        assert in_process(monkeypatch, *command, f"{users_file}:{function}") == 130
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a second one does not change the code
    assert capsys.readouterr() == ("", "gradfold: interrupted\n")


def test_ctrl_c_while_modules_are_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(types.ModuleType):
        def __getattr__(self, name: str) -> None:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "gradfold.cli", Interrupted("gradfold.cli"))
    assert in_process(monkeypatch, "workloads") == 130
    assert capsys.readouterr() == ("", "gradfold: interrupted\n")


EXACT, WRONG = ["verify", "linear"], ["verify", "encoder", "--weight", "samples", "--global-batch", "6"]


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["--version"], ["--help"], ["plan", "--help"], ["workloads"], ["workloads", "--json"]),
        *(["doctor", "--rules"], EXACT, [*EXACT, "--json"], WRONG),
        *(["plan", "linear", "--memory", "1GiB"], ["plan", "linear", "--memory", "1GiB", "--json"]),
    ],
)
def test_output_on_a_full_disk_is_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with text_file(Path("/dev/full")) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        code = in_process(monkeypatch, *arguments)
    assert code == (1 if arguments else 2)
    told = "gradfold: standard output could not be written: No space left on device.\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(("arguments", "code"), [(EXACT, 0), (WRONG, 1), (["workloads"], 0), (["--help"], 0)])
def test_a_reader_that_has_gone_changes_no_exit_code(
    arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with text_file(writer) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert in_process(monkeypatch, *arguments) == code
    assert capsys.readouterr().err == ""


def test_output_in_ascii(users_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with text_file(tmp_path / "printed", "ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert in_process(monkeypatch, "verify", f"{users_file}:linear") == 0
    assert b"linear: \\u2022 \\udcff\n" in (tmp_path / "printed").read_bytes()


@pytest.mark.parametrize(("cores", "most"), [(2, 64), (None, 64), (256, 256)])
def test_nproc_is_bounded_by_the_machine(cores: int | None, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(gradfold.cli.options, "launch", lambda arguments, num_ranks: num_ranks)
    with pytest.raises(OptionError, match=f"expected at most {most} processes"):
        gradfold.cli.options.launch_ranks(most + 1)
    with pytest.raises(typer.Exit) as started:
        gradfold.cli.options.launch_ranks(most)
    assert started.value.exit_code == most


def test_workloads_are_listed() -> None:
    listed = CliRunner().invoke(gradfold.cli.app, ["workloads"])
    assert listed.exit_code == 0
    as_json = CliRunner().invoke(gradfold.cli.app, ["workloads", "--json"])
    found = json.loads(as_json.stdout)
    assert [one["name"] for one in found] == list(registry.BUILT_IN)
    assert all(one["description"] and one["data"] for one in found)
    assert all(one["name"] in listed.stdout for one in found)
    assert max(map(len, listed.stdout.splitlines())) <= 100


def test_help_and_version() -> None:
    runner = CliRunner()
    version = runner.invoke(gradfold.cli.app, ["--version"])
    assert (version.exit_code, version.stdout.strip()) == (0, f"gradfold {gradfold.__version__}")
    top = runner.invoke(gradfold.cli.app, ["--help"])
    assert top.exit_code == 0 and "compare" in top.stdout and "workloads" in top.stdout
    # Wide enough that no phrase is broken; what is looked for is what a reader should learn.
    teaching = runner.invoke(gradfold.cli.app, ["compare", "--help"], env={"COLUMNS": "200"})
    for phrase in (
        *ARMS,
        "--precision",
        "matrix units",
        "--global-batch",
        "--micro-batch",
        "Examples",
        "Exit codes",
        "gradfold.Workload",
    ):
        assert phrase in teaching.stdout


@pytest.mark.parametrize("command", ["", "compare", "verify", "plan", "doctor", "workloads"])
def test_help_is_whole_in_a_terminal_of_eighty_columns(command: str) -> None:
    arguments = [*command.split(), "--help"]
    printed = CliRunner().invoke(gradfold.cli.app, arguments, env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).stdout
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    assert printed.replace("\n", "").isprintable()  # no byte was taken for a character


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich" or name.startswith("gradfold.cli")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delattr(gradfold, "cli")
    assert in_process(monkeypatch, "workloads") == 2
    assert 'pip install "gradfold[cli]"' in capsys.readouterr().err


def test_a_broken_import_of_ours_is_not_taken_for_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gradfold.cli")
    monkeypatch.delattr(gradfold, "cli")
    monkeypatch.setitem(sys.modules, "gradfold.cli.workloads", None)
    with pytest.raises(ModuleNotFoundError):
        gradfold.__main__.main()


def test_progress_is_a_line_per_arm_on_a_terminal_and_nothing_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    def tell(console: Console) -> str:
        with console.capture() as captured, showing_progress(console) as on_progress:
            on_progress(ArmProgress("full-batch", 10))
            on_progress(ArmProgress("gradfold", 10))
            on_progress(ArmProgress("full-batch", 10, "starting"))
            on_progress(ArmProgress("full-batch", 10, "training", 5, 3, 0.25))
            on_progress(ArmProgress("full-batch", 10, "finished", 10, 6, 0.125))
            on_progress(ArmProgress("gradfold", 10, "failed"))
        return captured.get()

    shown = tell(Console(force_terminal=True, width=100, color_system=None))
    assert "full-batch" in shown and "6 updates, loss 0.125" in shown and "gradfold" in shown and "failed" in shown
    assert tell(Console(force_terminal=False)) == ""
    assert capsys.readouterr().out == ""
