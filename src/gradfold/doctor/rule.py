"""A rule: one hazard, its explanation, and the check that looks for it in a run record.

Each rule is a module in `rules`. Its docstring is the explanation, with the fix as a diff; `check(record)` yields what
is wrong.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from gradfold.doctor.history import RunRecord
from gradfold.doctor.source import SourceLocation

_DOCSTRING = re.compile(
    r"(GF\d+): (.+) \((\w+)\)\.\n\n(.+)\n\nWhy: (.+)\nDetection: (.+)\nLimits: (.+)\n\nFix:\n(.+)", re.DOTALL
)


@dataclass(frozen=True)
class Violation:
    """What a rule's check reports: a finding without the rule's name and severity."""

    location: SourceLocation
    message: str
    fix: str
    confidence: Literal["certain", "likely"] = "certain"


Violations = Iterator[Violation]


@dataclass(frozen=True)
class Rule:
    """One hazard."""

    code: str  # such as "GF001"
    name: str
    severity: str  # "error", "warning" or "note", as in `Finding`
    what: str  # the pattern that is found
    why: str  # its effect
    detection: str  # what the record must show before the rule reports it
    limits: str  # what it does not see, and where it reports nothing
    wrong: str  # an example
    right: str  # the same, fixed
    check: Callable[[RunRecord], Violations]

    @staticmethod
    def of(module: ModuleType) -> Rule:
        """The rule that a module is."""
        text = ast.get_docstring(ast.parse(inspect.getsource(module)))  # under python -OO there is no `__doc__`
        match = _DOCSTRING.fullmatch(text or "")
        assert match, f"{module.__file__}: unexpected docstring"
        code, name, severity, *prose, diff = match.groups()
        what, why, detection, limits = (" ".join(paragraph.split()) for paragraph in prose)
        wrong, right = ("\n".join(line[2:] for line in diff.splitlines() if line[:1] != other) for other in "+-")
        return Rule(code, name, severity, what, why, detection, limits, wrong, right, module.check)


def num_micro_batches(count: int) -> str:
    """For example "1 micro-batch" or "3 micro-batches"."""
    return f"{count} micro-batch{'es' * (count != 1)}"
