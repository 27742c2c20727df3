"""The report in words: findings by file and line, and what the script does.

The page of rules, docs/doctor-rules.md, made from the rules themselves.

The report as SARIF 2.1.0, which editors and continuous integration show at the lines of a change.

Source: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

from gradfold.doctor.diagnose import Report
from gradfold.doctor.finding import Finding
from gradfold.doctor.instrumentation import Failure
from gradfold.doctor.rules import RULES
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []

NO_DIAGNOSIS = 70  # sysexits.h: an error within the program itself

_WIDTH = 100
_INDENT = "    "
_MOST_OF_ERROR = 160  # characters


def text(report: Report) -> str:
    """The whole report."""
    parts = [_ending(report), *map(_finding, report.findings)]
    if report.summary.get("num_backwards"):
        parts += [_verdict(report), _summary(report.summary)]
    if report.failure is not None:
        parts.append(_wrapped(_own_failure(report, report.failure), ""))
    return "\n\n".join(part for part in parts if part)


def exit_code(report: Report) -> int:
    """Of the command: the script's own where it failed; else 124 out of time, 70 no diagnosis, 1 findings, 0 none."""
    if report.ending.how == "timed out":
        return 124
    if report.ending.how == "failed":
        return report.ending.code
    if report.failure is not None:
        return NO_DIAGNOSIS
    return 1 if report.findings else 0


def shown_path(file: str) -> str:
    """A path as a reader would type it: relative where it is below the working folder."""
    try:
        return str(Path(file).resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return file


def _ending(report: Report) -> str:
    script, ending, summary = shown_path(report.script), report.ending, report.summary
    sentences = []
    if ending.how == "timed out":
        sentences.append(f"{script} ran past --timeout and was ended{_seen(summary)}. Give it more time, or less data.")
    elif ending.how == "failed":
        why = f": {ending.error}" if ending.error else ""
        sentences.append(f"{script} failed by itself, with exit code {ending.code}{why}{_seen(summary)}.")
    elif ending.how == "stopped":
        sentences.append(f"{script} was ended{_seen(summary)}, where enough was seen; --updates N watches more.")
    if report.failure is None and not summary.get("num_backwards"):
        sentences.append(
            f"{script} never called backward: there is nothing to examine. Does it train only with certain arguments? "
            f"Give them after two dashes: gradfold doctor {script} -- --epochs 1"
        )
    return "\n".join(_wrapped(sentence, "") for sentence in sentences)


def _seen(summary: dict[str, Any]) -> str:
    count = summary.get("num_updates")
    return "" if count is None else f", after {count} update{'s' * (count != 1)}"


def _own_failure(report: Report, failure: Failure) -> str:
    what = "Part of the diagnosis is missing" if report.summary else "No diagnosis"
    script = shown_path(report.script)
    after = "" if report.summary else f" From then on it did nothing, and {script} ran as without it."
    error = textwrap.shorten(failure.error, _MOST_OF_ERROR, placeholder=" ...")
    return (
        f"{what}: gradfold's doctor itself failed (at {failure.part}: {error}).{after} That is a defect of "
        "gradfold, not of the script; --debug prints where."
    )


def _finding(one: Finding) -> str:
    where = f"{shown_path(one.file)}:{one.line}" if one.line else shown_path(one.file)
    heading = f"{where}: {one.code} {one.name} [{one.severity}, {one.confidence}]"
    message = one.message[0].upper() + one.message[1:] if one.message[:1].isalpha() else one.message
    return "\n".join([heading, _wrapped(message), _wrapped(f"Instead: {one.fix}")])


def _verdict(report: Report) -> str:
    ignored = f" ({report.num_ignored} silenced by comments)" * (report.num_ignored > 0)
    count = len(report.findings)
    if not count:
        return f"{shown_path(report.script)}: no findings{ignored}."
    return (
        f"{shown_path(report.script)}: {count} finding{'s' * (count > 1)}{ignored}. `gradfold doctor --rules` explains."
    )


def _summary(summary: dict[str, Any]) -> str:
    lines = ["What the script does"]
    for one in summary["optimizers"]:
        lines.append(_INDENT + _optimizer(one))
    if summary["gradfold"]:
        lines.append(f"{_INDENT}gradfold accumulates")
    if summary["autocast"]:
        lines.append(f"{_INDENT}autocast: {', '.join(summary['autocast'])}")
    available = summary["available_bytes"]
    of = f" of {available / 1e9:.3g} GB" if available else ""
    what = "on the device" if summary["device"] == "cuda" else "in the process"
    lines.append(f"{_INDENT}peak memory {summary['peak_bytes'] / 1e9:.3g} GB{of} {what}")
    seconds = summary["seconds"]
    total = seconds["total"]
    if not total:
        return "\n".join(lines)
    names = {"data": "data", "forward_and_rest": "forward and the rest", "backward": "backward", "step": "steps"}
    shares = ", ".join(f"{label} {seconds[name] / total:.0%}" for name, label in names.items())
    lines.append(f"{_INDENT}{seconds['total']:.3g} s after the first update: {shares}")
    return "\n".join(lines)


def _optimizer(one: dict[str, Any]) -> str:
    length = one["window_length"]
    spread = f" ({one['shortest_window']} to {one['longest_window']})"
    varies = spread if one["shortest_window"] != one["longest_window"] else ""
    window = f"windows of {length} micro-batch{'es' * (length != 1)}{varies}"
    batch = f", effective batch {one['effective_batch']}" if one["effective_batch"] else ""
    epoch = f", {one['updates_per_epoch']} updates per epoch" if one["updates_per_epoch"] else ""
    return f"{one['optimizer']}: {one['num_updates']} updates seen, {window}{batch}{epoch}"


def _wrapped(paragraph: str, indent: str = _INDENT) -> str:
    width = (
        min(_WIDTH, int(os.environ.get("COLUMNS", _WIDTH) or _WIDTH))
        if os.environ.get("COLUMNS", "").isdigit()
        else _WIDTH
    )
    return textwrap.fill(
        paragraph,
        max(width, 40),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


_HEAD = """# What the doctor looks for

`gradfold doctor train.py -- ARGS` runs a training script unchanged for a few updates, and looks for these. Every
finding has a line of the script, says what was measured, and what to write instead. A comment
`# gradfold: ignore[GF012]` at the end of a line silences a rule there.

*error*: the gradient is not the one that was meant. *warning*: the model trains in another way than the code looks
like. *note*: right, at a needless cost. *certain*: it was seen; *likely*: what was seen has hardly another meaning.

This page is made from the rules (`gradfold doctor --rules` prints it).
"""


def rules_page() -> str:
    """The page, as Markdown."""
    rows = [f"| [{one.code}](#{one.code.lower()}) | {one.name} | {one.severity} |" for one in RULES]
    table = "\n".join(["| code | name | severity |", "|---|---|---|", *rows])
    return "\n".join([_HEAD, table, "", *map(_section, RULES)]).rstrip() + "\n"


def _section(rule: Rule) -> str:
    return f"""## {rule.code}

**{rule.name[0].upper()}{rule.name[1:]}** ({rule.severity}). {rule.what}

*Why it matters.* {rule.why}

*How it is found.* {rule.detection}

*Limits.* {rule.limits}

```py
# wrong
{rule.wrong.strip()}

# right
{rule.right.strip()}
```
"""


_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif(report: Report, version: str) -> dict[str, Any]:
    """The log of one run.

    Args:
        report: what was found.
        version: of gradfold.
    """
    driver = {"name": "gradfold doctor", "semanticVersion": version, "rules": [_rule(one) for one in RULES]}
    ending = report.ending
    invocation: dict[str, Any] = {
        "executionSuccessful": ending.how in ("ended", "stopped") and report.failure is None,
        "exitCode": ending.code,
    }
    if report.failure is not None:
        said = f"The doctor itself failed at {report.failure.part}: {report.failure.error}"
        invocation["toolExecutionNotifications"] = [{"level": "error", "message": {"text": said}}]
    return {
        "$schema": _SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "invocations": [invocation],
                "results": [_result(one) for one in report.findings],
            }
        ],
    }


def _rule(rule: Any) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in rule.name.replace(",", "").replace("-", " ").split()),
        "shortDescription": {"text": rule.name},
        "fullDescription": {"text": rule.what},
        "help": {"text": f"{rule.why}\n\nInstead:\n\n{rule.right}"},
        "defaultConfiguration": {"level": rule.severity},
    }


def _result(one: Finding) -> dict[str, Any]:
    path = Path(shown_path(one.file))
    location: dict[str, Any] = {"artifactLocation": {"uri": path.as_uri() if path.is_absolute() else path.as_posix()}}
    if one.line:
        location["region"] = {"startLine": one.line}
    return {
        "ruleId": one.code,
        "ruleIndex": next(index for index, rule in enumerate(RULES) if rule.code == one.code),
        "level": one.severity,
        "message": {"text": f"{one.message} Instead: {one.fix}"},
        "locations": [{"physicalLocation": location}],
        "properties": {"confidence": one.confidence},
    }
