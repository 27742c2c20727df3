"""The documentation: every example runs, every command is one, every local link leads somewhere."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

import gradfold
import gradfold.cli

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "benchmarks", "examples")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).glob("**/*.md"))])
COMMANDS = get_command(gradfold.cli.app).commands
# What stands for something of the reader's own.
STAND_INS = {"WORKLOAD": "digits", "DIR": ".", "N": "64", "ARGS": "--lr 1", "[": "", "]": ""}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(gradfold.__path__, "gradfold.")
    if not module.name.endswith("__main__") and not module.name.startswith("gradfold.cli")
)
WITH_EXAMPLES = {
    *("gradfold.accumulator", "gradfold.batchnorm.convert", "gradfold.dropout.convert", "gradfold.windows"),
    *("gradfold.dropout.layer", "gradfold.twophase.loss", "gradfold.losses"),
    *("gradfold.packing.packer", "gradfold.batch.rows", "gradfold.packing.token_budget"),
    *("gradfold.memory.amount", "gradfold.memory.auto", "gradfold.memory.estimate"),
    *("gradfold.memory.measure", "gradfold.memory.plan"),
    *("gradfold.batch.split", "gradfold.train_step", "gradfold.verification.verify", "gradfold.weights"),
    "gradfold.workloads.text_data",
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
def test_fragments_of_python_are_python(page):
    for block in re.findall(r"```py\n(.*?)```", page.read_text(), flags=re.DOTALL):
        ast.parse(block)


def commands_in(text):
    """What stands between backticks or in an indented line, from `gradfold` or `torchrun -m gradfold` on."""
    return re.findall(r"(?:`|^    )(?:torchrun -m )?gradfold ([^`\n]+?)(?:`|  +#.*|$)", text, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "text",
    [*(page.read_text() for page in PAGES), *(command.epilog or "" for command in COMMANDS.values())],
    ids=[*(str(page.relative_to(ROOT)) for page in PAGES), *(f"gradfold {name} --help" for name in COMMANDS)],
)
def test_commands_can_be_given(text):
    for command in commands_in(text):
        line = re.sub(r"\|[\w|]+", "", command)  # of alternatives the first
        for stand_in, meant in STAND_INS.items():
            line = re.sub(rf"(?<!\w){re.escape(stand_in)}(?!\w)", meant, line) if meant else line.replace(stand_in, "")
        name, *arguments = shlex.split(line)
        if name == "...":
            continue
        assert name in COMMANDS, command
        if name in ("verify", "plan", "doctor") and (not arguments or arguments[0].startswith("-")):
            arguments = ["digits", *arguments]  # where only an option is spoken of
        if name == "plan" and "--memory" not in arguments:
            arguments += ["--memory", "1GiB"]
        COMMANDS[name].make_context(name, arguments)  # raises click's UsageError


def test_commands_are_found_where_they_stand():
    text = "run `gradfold plan WORKLOAD --memory 1GiB [--global-batch N]`, or\n\n    gradfold compare  # all of it\n"
    assert commands_in(text) == ["plan WORKLOAD --memory 1GiB [--global-batch N]", "compare"]


def test_the_lists_of_examples_and_benchmarks_are_whole():
    def linked(folder):
        return set(re.findall(r"\]\(([^)]+)\)", (ROOT / folder / "README.md").read_text()))

    assert {path.name for path in (ROOT / "examples").glob("*.py")} == linked("examples")
    questions = {f"{page.parent.name}/README.md" for page in (ROOT / "benchmarks").glob("*/README.md")}
    assert questions == linked("benchmarks") - {"paired.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if "://" in link:
            continue
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor
