"""How a recorded script ends: by itself, stopped, failed, out of time; and what is said then."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from doctor.forked import diagnose

from gradfold.doctor.finding import Report
from gradfold.doctor.report import exit_code, text


def words(report: Report) -> str:
    """The report in words, on one line."""
    return " ".join(text(report).split())


TRAINING = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.randn(40, 3), batch_size=4)

def train(num_epochs):
    for epoch in range(num_epochs):
        for x in loader:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
"""


@pytest.fixture
def script(tmp_path: Path):
    def write(ending: str) -> Path:
        path = tmp_path / "train.py"
        path.write_text(TRAINING + textwrap.dedent(ending))
        return path

    return write


def test_a_script_that_ends_by_itself(script):
    report, printed = diagnose(script("train(1)\nprint('model saved')"))
    assert (report.ending.how, exit_code(report)) == ("ended", 0) and "model saved" in printed
    assert report.summary["is_whole_run"] and report.summary["num_updates"] == 10
    said = words(report)
    assert "train.py: no findings." in said and "windows of 1 micro-batch, effective batch 4" in said


def test_a_script_is_stopped_from_inside(script):
    """Its `finally` blocks run, what catches exceptions lets the stop through, and what follows does not run."""
    report, printed = diagnose(
        script(
            """
            try:
                try:
                    train(10**6)
                except Exception as error:
                    print("caught", error)
                finally:
                    print("closed")
            except KeyboardInterrupt:
                print("interrupted")
            print("saved")
            """
        ),
        num_updates=3,
    )
    assert (report.ending.how, exit_code(report)) == ("stopped", 0)
    assert printed.strip() == "closed"
    # the first epoch has 10 batches: it is recorded to its end, and two updates into the next
    assert report.summary["num_updates"] == 12


def test_a_script_that_catches_everything_is_stopped_all_the_same(script):
    report, printed = diagnose(
        script("for _ in range(10**6):\n    try:\n        train(1)\n    except BaseException as error:\n        pass")
    )
    assert report.ending.how == "stopped" and report.summary["num_updates"] == 12 and printed == ""


@pytest.mark.parametrize(
    ("ending", "code", "error"),
    [
        ("train(1)\nraise LookupError('no such column')", 1, "LookupError: no such column"),
        ("train(1)\nimport sys; sys.exit(3)", 3, "SystemExit: 3"),
        ("train(1)\nraise SystemExit('no data')", 1, "SystemExit: no data"),
        ("train(1)\nimport os; os._exit(7)", 7, ""),
    ],
)
def test_a_script_that_fails_keeps_its_exit_code(script, ending, code, error):
    report, printed = diagnose(script(ending))
    assert (report.ending.how, report.ending.error, exit_code(report)) == ("failed", error, code)
    assert f"failed by itself, with exit code {code}" in words(report) and "after 10 updates" in words(report)
    if "LookupError" in error:
        assert printed.rstrip().endswith(error) and "Traceback" in printed
        assert "gradfold" not in printed  # the traceback is the script's own


def test_a_script_with_a_wrong_syntax(script):
    report, printed = diagnose(script("train(1"))
    assert exit_code(report) == 1 and "SyntaxError" in printed and "SyntaxError" in report.ending.error


@pytest.mark.parametrize(("ending", "code"), [("print('usage: --train')", 0), ("raise SystemExit(5)", 5)])
def test_a_script_that_never_calls_backward(script, ending, code):
    report, _ = diagnose(script(ending))
    assert exit_code(report) == code
    assert "never called backward" in words(report) and " -- --epochs 1" in words(report)


def test_a_script_that_runs_past_its_time(script):
    report, printed = diagnose(
        script("train(1)\ntry:\n    open('out of time', 'w')\n    while True: pass\nfinally:\n    print('closed')")
    )
    assert (report.ending.how, exit_code(report)) == ("timed out", 124) and "closed" in printed
    assert "ran past --timeout" in words(report) and "after 10 updates" in words(report)


def test_a_script_that_does_not_listen_is_ended_hard(script):
    report, _ = diagnose(
        script(
            "train(1)\nopen('out of time', 'w')\nwhile True:\n    try:\n        import time; time.sleep(30)\n"
            "    except BaseException: pass"
        ),
        grace_s=0.3,
    )
    assert exit_code(report) == 124 and report.summary["num_updates"] == 10


def test_findings_and_ignore_comments(script):
    body = """
    for i, x in enumerate(loader):
        loss = model(x).square().mean(){first}
        loss.backward(){second}
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    """
    report, _ = diagnose(script(body.format(first="", second="")))
    (found,) = report.findings
    assert (found.code, exit_code(report)) == ("GF002", 1)
    assert Path(found.file).read_text().splitlines()[found.line - 1].strip() == "loss.backward()"
    report, _ = diagnose(script(body.format(first="", second="  # meant so  # gradfold: ignore[GF002, GF007]")))
    assert report.findings == () and report.num_ignored == 1 and exit_code(report) == 0
    assert "no findings (1 ignored by comments)" in words(report)
    report, _ = diagnose(script(body.format(first="", second="  # gradfold: ignore")))
    assert report.findings == ()
    for elsewhere in ("  # gradfold: ignore[GF003]", "; '# gradfold: ignore'"):
        report, _ = diagnose(script(body.format(first="  # gradfold: ignore", second=elsewhere)))
        assert len(report.findings) == 1


def test_the_script_sees_itself_as_the_main_program(tmp_path):
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    path = tmp_path / "train.py"
    path.write_text(
        "# args: --lr 0.1\nimport sys, pickle, beside\nclass Config: pass\n"
        "assert type(pickle.loads(pickle.dumps(Config()))) is Config\n"
        "main = sys.modules['__main__']\n"
        "print(__name__, sys.argv[1:], beside.NAME, main.__file__ == __file__, sys.argv[0] == __file__)"
    )
    _, printed = diagnose(path)
    assert printed.strip() == "__main__ ['--lr', '0.1'] beside True True"
