"""A finding: one thing that is wrong, where, its effect in numbers, and the suggested fix. A report: all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradfold.doctor.instrumentation import Failure


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    code: str  # of the rule, such as "GF001"
    name: str  # of the rule
    # "error" (the gradient is not the intended one), "warning" (the model trains in another way than the code looks
    # like) or "note" (right, at a needless cost).
    severity: str
    confidence: str  # "certain" (seen) or "likely" (what was seen has hardly another meaning)
    file: str
    line: int  # of the user's; 0 where unknown
    message: str  # what happens and its effect, in numbers
    fix: str


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    how: str  # "ended" (by itself), "stopped" (enough was seen), "failed" (exception or exit code) or "timed out"
    code: int  # the script's own exit code; 0 where it was stopped
    error: str = ""  # the last line of its traceback, where it failed with one


@dataclass(frozen=True)
class Report:
    """What the doctor says of one script."""

    script: str
    ending: Ending
    findings: tuple[Finding, ...]  # by file, line and code
    summary: dict[str, Any]  # what the script does, in plain values
    num_ignored: int = 0  # findings that a comment ignores
    failure: Failure | None = None  # of the doctor itself; after it nothing was checked, but by other rules
