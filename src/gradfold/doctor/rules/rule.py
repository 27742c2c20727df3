"""A rule: one hazard, what is said about it, and the check that looks for it in a case."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gradfold.doctor.finding import Observation
from gradfold.doctor.history import RunRecord

__all__: list[str] = []


@dataclass(frozen=True)
class Rule:
    """One hazard.

    Attributes:
        code, name: "GF001" and a few words.
        severity: "error", "warning" or "note", as in `Finding`.
        what: what it does: the pattern that is found.
        why: why that is bad.
        detection: what the trace must show before the rule says anything.
        limits: what it does not see, and where it keeps silent.
        wrong, right: an example, and what to write instead.
        check: looks for it.
    """

    code: str
    name: str
    severity: str
    what: str
    why: str
    detection: str
    limits: str
    wrong: str
    right: str
    check: Callable[[RunRecord], Iterable[Observation]]
