"""Whatever fails in the doctor itself, the script runs as without it: every function of the doctor's raises once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import json
import os
import pkgutil
import runpy
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from types import CodeType

import pytest
import torch
from doctor.forked import diagnose
from processes import CONTEXT

import gradfold.doctor
import gradfold.doctor.diagnose
from gradfold.doctor import instrumentation, run
from gradfold.doctor.diagnose import diagnose_run
from gradfold.doctor.finding import Report
from gradfold.doctor.instrumentation import Guard
from gradfold.doctor.report import exit_code, sarif, text
from gradfold.doctor.rules import RULES
from gradfold.engine import loss_graph

EVERYTHING = Path(__file__).parent / "everything.py"
FOLDER = str(Path(gradfold.doctor.__file__).parent)
OURS = FOLDER, loss_graph.__file__  # what the doctor runs of gradfold
# What stands between the doctor and the script, and what starts the script, cannot be guarded by itself.
UNGUARDED = (instrumentation.__file__, run.__file__)
# Of the doctor, but not of its hooks: what the parent process does with a report, and what ends the script.
AFTERWARDS = ("__main__", "process", "report", "stop")
# They call the guard, or hand out what torch asks for.
BOUNDARY = ("diagnose.diagnose_run", "optimizer_hooks._duplicate.<locals>.<genexpr>")
SECTIONS = ("classify", "closures", "compare_samples", "low_precision", "ranks", "broken_loader")  # the quickest last


class InjectedError(Exception):
    """What the doctor is made to raise."""


def recorded_code() -> dict[CodeType, str]:
    """Every function that runs while the script does, with those inside of it and its generator expressions."""
    found: dict[CodeType, str] = {}
    names = [f"gradfold.doctor.{info.name}" for info in pkgutil.iter_modules([FOLDER])]
    for module in map(importlib.import_module, [*names, loss_graph.__name__]):
        name = module.__name__.rpartition(".")[2]
        if name in AFTERWARDS or module.__file__ in UNGUARDED:
            continue
        todo = list(compile(inspect.getsource(module), module.__file__, "exec").co_consts)
        while todo:
            code = todo.pop()
            if isinstance(code, CodeType):
                found[code] = f"{name}.{code.co_qualname}"
                todo += code.co_consts
    is_class = {one for one, name in found.items() if "__qualname__" in one.co_names}
    return {
        code: name
        for code, name in found.items()
        if code not in is_class and name not in BOUNDARY and ".<genexpr>" not in name[name.index(".") :][:10]
    }


def key(code: CodeType) -> tuple[str, int, str]:
    return code.co_filename, code.co_firstlineno, code.co_name


def printed_by(action) -> str:
    """What it prints; the process is brought to the same state before."""
    output = io.StringIO()
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        action()
    return output.getvalue()


def alone(section: str) -> str:
    """What a section of the script prints without the doctor."""
    arguments = sys.argv
    sys.argv = [str(EVERYTHING), section]
    try:
        return printed_by(lambda: runpy.run_path(str(EVERYTHING), run_name="__main__"))
    finally:
        sys.argv = arguments


def doctored(section: str, tracer) -> tuple[str, run.Run]:
    """What it prints under the doctor, and the run."""
    found: list[run.Run] = []

    def record() -> None:
        sys.settrace(tracer)
        try:
            found.append(run.run(EVERYTHING, [section], 10**6, None, lambda this: None))
        finally:
            sys.settrace(None)

    return printed_by(record), found[0]


def examined(this: run.Run, tracer) -> Report:
    """What is said of a run that has ended."""
    sys.settrace(tracer)
    try:
        return diagnose_run(this)
    finally:
        sys.settrace(None)


def forget() -> None:
    """Empty the doctor's caches."""
    for name, module in list(sys.modules.items()):
        if name.startswith("gradfold.doctor."):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


def counting(calls: dict[tuple[str, int, str], int]):
    """A tracer that counts how often each function of the doctor's is entered."""

    def count(frame, event, _argument):
        if frame.f_code.co_filename.startswith(OURS):
            calls[key(frame.f_code)] = calls.get(key(frame.f_code), 0) + 1

    return count


def failing(target: tuple[str, int, str], number: int):
    """A tracer that makes a function raise when it is entered for the `number`th time."""

    def fail(frame, event, _argument):
        nonlocal number
        if key(frame.f_code) == target:
            number -= 1
            if not number:
                raise InjectedError

    return fail


def every_fault() -> dict[str, object]:
    """Runs the script alone, under the doctor, and under the doctor with each fault; then judges it with each fault."""
    codes = {key(code): code for code in recorded_code()}
    names = {key(code): name for code, name in recorded_code().items()}
    expected = {section: alone(section) for section in SECTIONS}
    unlike, unnoticed, failures, points, late = [], [], [], {}, {}
    for section in SECTIONS:
        calls: dict[tuple[str, int, str], int] = {}
        said, this = doctored(section, counting(calls))
        unlike += [section] * (said != expected[section])
        for one, code in codes.items():
            if calls.get(one):
                points[one, 1] = section
            if calls.get(one, 0) > 1 and code.co_flags & inspect.CO_GENERATOR and code.co_name != "<genexpr>":
                points[one, 2] = section  # entered again: in a hook, after the call
        calls.clear()
        failures += [one for one in [examined(this, counting(calls)).failure] if one is not None]
        late |= {one: this for one in codes if calls.get(one) and (one, 1) not in points}
    for (target, number), section in points.items():
        said, this = doctored(section, failing(target, number))
        if this.guard.failure is None and said == expected[section]:  # what was remembered is not computed again
            forget()
            said, this = doctored(section, failing(target, number))
        unlike += [f"{names[target]} ({number}, {section})"] * (said != expected[section])
        unnoticed += [f"{names[target]} ({number}, {section})"] * (not is_known(diagnose_run(this)))
    for target, this in late.items():
        this.guard.failure = None
        forget()
        unnoticed += [names[target]] * (not is_known(examined(this, failing(target, 1))))
    return {
        "printed": "".join(expected.values()),
        "failures": failures,
        "num_points": len(points) + len(late),
        "never_called": sorted(name for one, name in names.items() if (one, 1) not in points and one not in late),
        "unlike": unlike,
        "unnoticed": unnoticed,
    }


def is_known(report: Report) -> bool:
    """Whether the report says that the doctor failed."""
    return report.failure is not None and "InjectedError" in report.failure.traceback and exit_code(report) == 70


def _in_process(function, answer) -> None:
    torch.set_num_threads(1)
    try:
        result = function()
    except BaseException:
        result = {"error": traceback.format_exc()}
    torch.save(result, answer)
    os._exit(0)


def forked(function, timeout_s=100):
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer")
        process = CONTEXT.Process(target=_in_process, args=(function, answer))
        process.start()
        process.join(timeout_s)
        process.kill()
        return torch.load(answer, weights_only=False)


def test_whatever_fails_the_script_prints_the_same_to_the_last_bit():
    found = forked(every_fault)
    assert "error" not in found, found["error"]
    assert found["printed"].count("\n") > 15 and found["failures"] == []
    assert found["num_points"] > 300 and len(found["never_called"]) < 20, found["never_called"]
    assert found["unlike"] == [] and found["unnoticed"] == []


TRAINING = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(torch.randn(80, 3), batch_size=4)
for i, x in enumerate(loader):
    model(x).square().mean().backward()
    if i % 2:
        optimizer.step()
        optimizer.zero_grad()
    {in_the_loop}
print("done", model.weight.tolist())
"""


def words(report: Report) -> str:
    return " ".join(text(report).split())


def test_without_a_diagnosis_the_script_runs_to_its_end_and_the_report_says_so(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAINING.format(in_the_loop="pass"))
    report, printed = diagnose(script, num_updates=2)
    assert (report.ending.how, exit_code(report), printed) == ("stopped", 1, "")

    sabotage = (
        "import gradfold.doctor.gradient_state as s; s.GradientProvenance.change = lambda self: {}['no such key']"
    )
    script.write_text(TRAINING.format(in_the_loop=f"if i == 1: {sabotage}"))
    report, printed = diagnose(script, num_updates=2)
    assert (report.ending.how, exit_code(report), report.findings) == ("ended", 70, ())
    assert printed.startswith("done [[") and "never called backward" not in words(report)
    said = words(report)
    assert "No diagnosis: gradfold's doctor itself failed (at backward: KeyError: 'no such key')" in said
    assert "a defect of gradfold, not of the script" in said and report.failure.traceback.startswith("Traceback")
    assert json.loads(json.dumps(dataclasses.asdict(report)))["failure"] == dataclasses.asdict(report.failure)
    (run,) = sarif(report, "1.0")["runs"]
    (invocation,) = run["invocations"]
    assert not invocation["executionSuccessful"] and "backward" in str(invocation["toolExecutionNotifications"])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_a_rule_that_fails_leaves_the_others(rule, tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text(TRAINING.format(in_the_loop="pass"))

    def fail(_record):
        raise InjectedError

    broken = tuple(dataclasses.replace(one, check=fail) if one is rule else one for one in RULES)
    monkeypatch.setattr(gradfold.doctor.diagnose, "RULES", broken)
    report = diagnose_run(run.run(script, [], 4, None, lambda this: None))
    assert exit_code(report) == 70 and report.failure.part == f"rule {rule.code}"
    assert [one.code for one in report.findings] == ["GF002"] * (rule.code != "GF002")
    assert "Part of the diagnosis is missing" in words(report)


def test_a_failing_script_keeps_its_own_exit_code(tmp_path):
    script = tmp_path / "train.py"
    sabotage = "import gradfold.doctor.gradient_state as s; s.GradientProvenance.change = None; i == 7 and exit(5)"
    script.write_text(TRAINING.format(in_the_loop=sabotage))
    report, _ = diagnose(script)
    assert exit_code(report) == 5 and report.failure is not None
    assert "failed by itself, with exit code 5" in words(report) and "No diagnosis" in words(report)


COMPILED = """
import torch
import torch.nn.functional as F
torch.manual_seed(0)
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{how}
def loss_fn(output, y):
    return F.cross_entropy(output, y)
for _ in range(3):
    loss_fn(model(torch.randn(8, 4)), torch.randint(0, 3, (8,))).backward()
    optimizer.step()
    optimizer.zero_grad()
print(model.weight.tolist())
"""


@pytest.mark.parametrize(
    "how",
    ['@torch.compile(fullgraph=True, backend="eager")', "@torch.jit.script", "# as it is"],
    ids=lambda how: how[1:8],
)
def test_compilers_see_what_torch_has(how, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import warnings; warnings.simplefilter('ignore')\n" + COMPILED.format(how=how))
    report, printed = diagnose(script)
    assert (report.ending.how, report.failure, report.findings) == ("ended", None, ()), printed
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        torch.nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(0, 3, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert printed.strip() == str(model.weight.tolist())


def test_a_step_that_raises_is_over(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("""
import torch
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def closure():
    raise ArithmeticError
try:
    optimizer.step(closure)
except ArithmeticError:
    print("no loss today")
for x in torch.randn(6, 4, 3):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
""")
    report, printed = diagnose(script)
    assert report.summary["num_updates"] == 6 and report.findings == () and printed == "no loss today\n"


def test_a_hook_may_end_before_or_change_the_call():
    guard = Guard()

    def doubled(number: int):
        outcome = yield ((2 * number,), {})
        seen.append((outcome.result, outcome.error))

    def nothing(_number: int):
        return
        yield

    seen: list[object] = []
    assert guard.call("abs", doubled, abs, (-3,), {}) == 6 and seen == [(6, None)]
    assert guard.call("abs", nothing, abs, (-3,), {}) == 3 and guard.failure is None
    with pytest.raises(TypeError, match="bad operand"):
        guard.call("abs", lambda text: (yield), abs, ("",), {})
    assert guard.failure is None

    def stopping(_number: int):
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        guard.call("abs", stopping, abs, (-3,), {})
