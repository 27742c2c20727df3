"""A finding: one thing that is wrong, where, what it does in numbers, and what to write instead."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gradfold.doctor.source import SourceLocation

__all__: list[str] = []

ERROR, WARNING, NOTE = "error", "warning", "note"  # severities, which are SARIF's levels
CERTAIN, LIKELY = "certain", "likely"  # confidences


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        code: of the rule, such as "GF001".
        name: of the rule.
        severity: "error" (the gradient is not the one meant), "warning" (training is not what the code looks like) or
            "note" (right, at a needless cost).
        confidence: "certain" (seen) or "likely" (what was seen has hardly another meaning).
        file, line: of the user's.
        message: what happens and what it does, in numbers.
        fix: what to write instead.
    """

    code: str
    name: str
    severity: str
    confidence: str
    file: str
    line: int
    message: str
    fix: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Observation:
    """What a rule saw: a finding, before the rule's own name and severity are put to it."""

    place: SourceLocation
    message: str
    fix: str
    confidence: str = CERTAIN
