"""The documentation: every example runs, every local link leads somewhere."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import gradfold

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(gradfold.__path__, "gradfold.")
    if not module.name.endswith("__main__") and not module.name.startswith("gradfold.cli")
)
WITH_EXAMPLES = {
    *("gradfold.accumulator", "gradfold.coupled.convert", "gradfold.coupled.dropout", "gradfold.loader"),
    *("gradfold.coupled.keyed_dropout", "gradfold.coupled.two_phase", "gradfold.losses.info_nce"),
    *("gradfold.length_plan", "gradfold.rows", "gradfold.token_budget"),
    *("gradfold.memory.amount", "gradfold.memory.auto", "gradfold.memory.largest"),
    *("gradfold.memory.measure", "gradfold.memory.plan"),
    *("gradfold.split", "gradfold.train_step", "gradfold.verification.verify", "gradfold.weight"),
    "gradfold.workloads.words",
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
    assert found.attempted > 0 or name not in WITH_EXAMPLES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page):
    namespace: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)  # blocks of a page build on each other


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link
