"""The command line: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

import gradfold
import gradfold.__main__
import gradfold.cli
from gradfold.cli.tables import showing_progress
from gradfold.compare import ArmProgress
from gradfold.compare.arms import ARMS
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
