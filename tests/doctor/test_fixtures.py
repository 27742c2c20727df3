"""Every script under the doctor: exactly the findings that its first line names, no more and no less."""

from __future__ import annotations

from pathlib import Path

import pytest
from doctor.forked import diagnose, expected

from gradfold.doctor.rules import RULES

HERE = Path(__file__).parent
SCRIPTS = sorted([*HERE.glob("fixtures/*/*.py"), *HERE.glob("literature/*.py")])
# A script with a finding per rule is fast.
FAST = {script.parent.name: script for script in sorted(SCRIPTS, key=lambda script: len(expected(script)))}.values()
TIERS = [pytest.param(script, marks=[] if script in FAST else pytest.mark.slow) for script in SCRIPTS]


@pytest.mark.parametrize("script", TIERS, ids=lambda script: f"{script.parent.name}/{script.stem}")
def test_exactly_the_findings_it_deserves(script):
    report, printed = diagnose(script)
    assert {one.code for one in report.findings} == expected(script), (report.findings, printed)
    assert report.ending.how in ("ended", "stopped"), printed
    assert report.summary["num_backwards"] > 0 or ".backward(" not in script.read_text("utf-8")
    assert "Traceback" not in printed
    for one in report.findings:
        assert one.file == str(script)
        assert 0 < one.line <= len(script.read_text("utf-8").splitlines())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_every_rule_has_faults_and_near_misses(rule):
    scripts = [script for script in SCRIPTS if script.parent.name == rule.code]
    faults = [script for script in scripts if rule.code in expected(script)]
    near_misses = [script for script in scripts if not expected(script)]
    assert len(faults) >= 2 and len(near_misses) >= 2


def test_there_are_healthy_scripts_in_many_styles():
    healthy = [script for script in SCRIPTS if script.parent.name == "healthy"]
    assert len(healthy) >= 30 and not any(map(expected, healthy))
