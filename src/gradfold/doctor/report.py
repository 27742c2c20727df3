"""The report as text and as SARIF, its exit code, and the page of rules.

SARIF 2.1.0 is what editors and continuous integration show at the lines of a change:
https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import Any

from gradfold.doctor.finding import Finding, Report
from gradfold.doctor.instrumentation import Failure
from gradfold.doctor.rule import Rule, num_micro_batches
from gradfold.doctor.rules import RULES

NO_DIAGNOSIS = 70  # sysexits.h: an error within the program itself

_WIDTH = 100
_INDENT = "    "
_MOST_OF_ERROR = 160  # characters
_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def exit_code(report: Report) -> int:
    """Of the command: the script's own where it failed; else 124 out of time, 70 no diagnosis, 1 findings, 0 none."""
    if report.ending.how == "timed out":
        return 124
    if report.ending.how == "failed":
        return report.ending.code
    if report.failure is not None:
        return NO_DIAGNOSIS
    return 1 if report.findings else 0


def text(report: Report) -> str:
    """The whole report."""
    parts = ["\n".join(_wrapped(sentence, "") for sentence in _ending(report)), *map(_finding, report.findings)]
    if report.summary.get("num_backwards"):
        parts += [_verdict(report), "\n".join(["What the script does", *_summary(report.summary)])]
    if report.failure is not None:
        parts.append(_wrapped(_own_failure(report.failure, report), ""))
    return "\n\n".join(part for part in parts if part)


def _ending(report: Report) -> list[str]:
    script, ending, summary = _shown_path(report.script), report.ending, report.summary
    error = f": {ending.error}" if ending.error else ""
    count = summary.get("num_updates")
    seen = "" if count is None else f", after {count} update{'s' * (count != 1)}"
    sentences = {
        "ended": [],
        "timed out": [f"{script} ran past --timeout and was ended{seen}. Allow it more time, or use less data."],
        "failed": [f"{script} failed by itself, with exit code {ending.code}{error}{seen}."],
        "stopped": [f"{script} was ended{seen}, since enough was seen; --updates N records more."],
    }[ending.how]
    if report.failure is None and not summary.get("num_backwards"):
        sentences.append(
            f"{script} never called backward: there is nothing to examine. If it trains only with certain arguments, "
            f"pass them after two dashes: gradfold doctor {script} -- --epochs 1"
        )
    return sentences


def _finding(one: Finding) -> str:
    where = f"{_shown_path(one.file)}:{one.line}" if one.line else _shown_path(one.file)
    heading = f"{where}: {one.code} {one.name} [{one.severity}, {one.confidence}]"
    message = one.message[:1].upper() + one.message[1:]
    return "\n".join([heading, _wrapped(message), _wrapped(f"Fix: {one.fix}")])


def _verdict(report: Report) -> str:
    ignored = f" ({report.num_ignored} ignored by comments)" if report.num_ignored else ""
    count = len(report.findings)
    findings = f"{count or 'no'} finding{'s' * (count != 1)}{ignored}."
    return f"{_shown_path(report.script)}: {findings}" + " `gradfold doctor --rules` explains." * (count > 0)


def _summary(summary: dict[str, Any]) -> list[str]:
    lines = [_optimizer(one) for one in summary["optimizers"]]
    if summary["gradfold"]:
        lines.append("gradfold accumulates")
    if summary["autocast"]:
        lines.append(f"autocast: {', '.join(summary['autocast'])}")
    available = f" of {summary['available_bytes'] / 1e9:.3g} GB" if summary["available_bytes"] else ""
    where = "on the device" if summary["device"] == "cuda" else "in the process"
    lines.append(f"peak memory {summary['peak_bytes'] / 1e9:.3g} GB{available} {where}")
    seconds, total = summary["seconds"], summary["seconds"]["total"]
    if total:
        names = {"data": "data", "forward_and_rest": "forward and the rest", "backward": "backward", "step": "steps"}
        shares = ", ".join(f"{label} {seconds[name] / total:.0%}" for name, label in names.items())
        lines.append(f"{total:.3g} s after the first update: {shares}")
    return [_INDENT + line for line in lines]


def _optimizer(one: dict[str, Any]) -> str:
    shortest, longest = one["shortest_window"], one["longest_window"]
    varies = f" ({shortest} to {longest})" if shortest != longest else ""
    batch = f", effective batch {one['effective_batch']}" if one["effective_batch"] else ""
    epoch = f", {one['updates_per_epoch']} updates per epoch" if one["updates_per_epoch"] else ""
    windows = f"windows of {num_micro_batches(one['window_length'])}{varies}"
    return f"{one['optimizer']}: {one['num_updates']} updates seen, {windows}{batch}{epoch}"


def _own_failure(failure: Failure, report: Report) -> str:
    what = "Part of the diagnosis is missing" if report.summary else "No diagnosis"
    error = textwrap.shorten(failure.error, _MOST_OF_ERROR, placeholder=" ...")
    after = f" From then on it recorded nothing, and {_shown_path(report.script)} ran as without it."
    return (
        f"{what}: gradfold's doctor itself failed (at {failure.part}: {error}).{after * (not report.summary)} "
        "That is a defect of gradfold, not of the script; --debug prints where."
    )


def _shown_path(file: str) -> str:
    """A path as a reader would type it: relative where it is below the working folder."""
    try:
        return str(Path(file).resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return file


def _wrapped(paragraph: str, indent: str = _INDENT) -> str:
    width = max(40, min(_WIDTH, shutil.get_terminal_size((_WIDTH, 0)).columns))
    wrapper = textwrap.TextWrapper(width - len(indent), break_long_words=False, break_on_hyphens=False)
    return textwrap.indent(wrapper.fill(paragraph), indent)


def sarif(report: Report, version: str) -> dict[str, Any]:
    """The report as a SARIF log of one run; `version` is gradfold's."""
    failure, ending = report.failure, report.ending
    invocation: dict[str, Any] = {
        "executionSuccessful": ending.how in ("ended", "stopped") and failure is None,
        "exitCode": ending.code,
    }
    if failure is not None:
        message = {"text": f"The doctor itself failed at {failure.part}: {failure.error}"}
        invocation["toolExecutionNotifications"] = [{"level": "error", "message": message}]
    driver = {"name": "gradfold doctor", "semanticVersion": version, "rules": [_sarif_rule(one) for one in RULES]}
    results = [_sarif_result(one) for one in report.findings]
    run = {"tool": {"driver": driver}, "invocations": [invocation], "results": results}
    return {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}


def _sarif_rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in rule.name.replace(",", "").replace("-", " ").split()),
        "shortDescription": {"text": rule.name},
        "fullDescription": {"text": rule.what},
        "help": {"text": f"{rule.why}\n\nSuggested fix:\n\n{rule.right}"},
        "defaultConfiguration": {"level": rule.severity},
    }


def _sarif_result(one: Finding) -> dict[str, Any]:
    path = Path(_shown_path(one.file))
    location: dict[str, Any] = {"artifactLocation": {"uri": path.as_uri() if path.is_absolute() else path.as_posix()}}
    if one.line:
        location["region"] = {"startLine": one.line}
    return {
        "ruleId": one.code,
        "ruleIndex": [rule.code for rule in RULES].index(one.code),
        "level": one.severity,
        "message": {"text": f"{one.message} Fix: {one.fix}"},
        "locations": [{"physicalLocation": location}],
        "properties": {"confidence": one.confidence},
    }


_PAGE = """# What the doctor looks for

`gradfold doctor train.py -- ARGS` runs a training script unchanged for a few updates, and looks for these hazards.
Every finding names a line of the script, says what was measured, and suggests a fix. A comment
`# gradfold: ignore[GF012]` at the end of a line ignores a rule there.

*error*: the gradient is not the intended one. *warning*: the model trains in another way than the code looks like.
*note*: right, at a needless cost. *certain*: it was seen; *likely*: what was seen has hardly another meaning.

This page is made from the rules (`gradfold doctor --rules` prints it).

| code | name | severity |
|---|---|---|
"""


def rules_page() -> str:
    """The page, as Markdown."""
    rows = [f"| [{one.code}](#{one.code.lower()}) | {one.name} | {one.severity} |" for one in RULES]
    return _PAGE + "\n".join([*rows, "", *map(_section, RULES)]).rstrip() + "\n"


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
