"""`gradfold doctor` as a user runs it: a process that starts a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import largest_file
from typer.testing import CliRunner

from gradfold.cli import app
from gradfold.doctor.finding import Ending, Report
from gradfold.doctor.report import rules_page
from gradfold.doctor.rules import RULES
from gradfold.errors import OptionError

LITERATURE = Path(__file__).parents[1] / "doctor" / "literature"
RUNNER = CliRunner()


def doctor(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradfold", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=120)


@pytest.mark.slow
def test_json_and_sarif_of_a_script_with_a_finding(tmp_path):
    sarif_file = tmp_path / "doctor.sarif"
    ended = doctor("mnist_perceptron.py", "--json", "--updates", "3", "--sarif", str(sarif_file), cwd=LITERATURE)
    assert ended.returncode == 1, ended.stderr
    report = json.loads(ended.stdout)
    (finding,) = report["findings"]
    keys = {"code", "name", "severity", "confidence", "file", "line", "message", "fix"}
    assert set(finding) == keys and finding["code"] == "GF002" and finding["file"] == "mnist_perceptron.py"
    assert "4 times too large" in finding["message"] and "(loss / 4).backward()" in finding["fix"]
    (optimizer,) = report["summary"]["optimizers"]
    assert (
        optimizer["window_length"] == 4 and optimizer["effective_batch"] == 64 and report["summary"]["peak_bytes"] > 0
    )
    assert "Train Epoch: 1" in ended.stderr  # the script's own output

    log = json.loads(sarif_file.read_text())
    (run,) = log["runs"]
    (result,) = run["results"]
    assert log["version"] == "2.1.0" and [one["id"] for one in run["tool"]["driver"]["rules"]] == [
        r.code for r in RULES
    ]
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"] == "GF002"
    assert result["level"] == "error" and "4 times too large" in result["message"]["text"]
    place = result["locations"][0]["physicalLocation"]
    assert place == {"artifactLocation": {"uri": "mnist_perceptron.py"}, "region": {"startLine": finding["line"]}}


def test_a_report_is_printed_even_where_its_sarif_cannot_be_written(tmp_path, monkeypatch):
    report = Report("train.py", Ending("ended", 0), (), {})
    monkeypatch.setattr("gradfold.cli.doctor.diagnose", lambda *_, **__: report)
    sarif_file = tmp_path / "doctor.sarif"
    sarif_file.write_text("an older one")
    with largest_file(64):
        ended = RUNNER.invoke(app, ["doctor", "train.py", "--sarif", str(sarif_file), "--json"])
    assert isinstance(ended.exception, OptionError) and f"--sarif {sarif_file}: File too large" in str(ended.exception)
    assert json.loads(ended.stdout)["script"] == "train.py"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older one"]


def test_a_script_with_arguments_that_fails(tmp_path):
    (tmp_path / "train.py").write_text(
        "import sys, torch\n"
        "model = torch.nn.Linear(2, 1)\n"
        "for _ in range(2):\n    model(torch.ones(3, 2)).mean().backward()\n"
        "print('arguments', sys.argv[1:], flush=True)\nsys.exit(int(sys.argv[2]))\n"
    )
    ended = doctor("train.py", "--", "--code", "9", cwd=tmp_path)
    assert ended.returncode == 9
    assert ended.stdout.startswith("arguments ['--code', '9']\n")
    assert "train.py failed by itself, with exit code 9" in ended.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "nowhere.py does not exist"),
        ([], "missing script"),
        ([__file__, "--updates", "0"], "--updates 0: expected at least 1"),
        ([__file__, "--timeout", "-1"], "--timeout -1: expected seconds above 0"),
    ],
)
def test_wrong_usage(arguments, message):
    ended = RUNNER.invoke(app, ["doctor", *arguments])
    assert message in str(ended.exception) and ended.exception.exit_code == 2


def test_the_page_of_rules_is_in_step():
    page = Path(__file__).parent.parent.parent / "docs" / "doctor-rules.md"
    assert page.read_text("utf-8") == rules_page(), "run: gradfold doctor --rules > docs/doctor-rules.md"
    assert RUNNER.invoke(app, ["doctor", "--rules"]).stdout == rules_page()


def test_rules_are_numbered_and_say_all_they_should():
    assert [rule.code for rule in RULES] == [f"GF{number:03}" for number in range(1, 18)]
    for rule in RULES:
        assert rule.severity in ("error", "warning", "note")
        for text in (rule.what, rule.why, rule.detection, rule.limits):
            assert len(text) > 30 and text.endswith((".", "?"))
        for code in (rule.wrong, rule.right):
            compile(code, rule.code, "exec")
    assert len({rule.name for rule in RULES}) == len(RULES)
