"""The report in words: findings by file and line, and what the script does."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

from gradfold.doctor.examine import Report
from gradfold.doctor.finding import Finding

__all__: list[str] = []

_WIDTH = 100
_INDENT = "    "


def text(report: Report) -> str:
    """The whole report."""
    parts = [_ending(report), *map(_finding, report.findings)]
    if report.summary.get("num_backwards"):
        parts += [_verdict(report), _summary(report.summary)]
    return "\n\n".join(part for part in parts if part)


def exit_code(report: Report) -> int:
    """Of the command: the script's own where it failed, 124 where it was out of time, 1 with findings, else 0."""
    if report.ending.how == "timed out":
        return 124
    if report.ending.how == "failed":
        return report.ending.code
    return 1 if report.findings else 0


def shown_path(file: str) -> str:
    """A path as a reader would type it: relative where it is below the working folder."""
    try:
        return str(Path(file).resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return file


def _ending(report: Report) -> str:
    script, ending, summary = shown_path(report.script), report.ending, report.summary
    seen = f"{summary.get('num_updates', 0)} updates were seen"
    sentences = []
    if ending.how == "timed out":
        sentences.append(f"{script} ran past --timeout and was ended; {seen}. Give it more time, or less data.")
    elif ending.how == "failed":
        why = f": {ending.error}" if ending.error else ""
        sentences.append(f"{script} failed by itself, with exit code {ending.code}{why}. Until then {seen}.")
    if not summary.get("num_backwards"):
        sentences.append(
            f"{script} never called backward: there is nothing to examine. Does it train only with certain arguments? "
            f"Give them after two dashes: gradfold doctor {script} -- --epochs 1"
        )
    return "\n".join(_wrapped(sentence, "") for sentence in sentences)


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
    lines = ["What it does"]
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
