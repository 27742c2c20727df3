"""The report as SARIF 2.1.0, which editors and continuous integration show at the lines of a change.

Source: https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradfold.doctor.examine import Report
from gradfold.doctor.finding import Finding
from gradfold.doctor.report import shown_path
from gradfold.doctor.rules import RULES

__all__: list[str] = []

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
