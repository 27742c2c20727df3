"""The documentation: every example runs, every command is one, every local link leads somewhere.

One test per law, which lists all that breaks it.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from typer.main import get_command

import gradfold
import gradfold.cli

ROOT = Path(__file__).parents[2]
FOLDERS = ("docs", "benchmarks", "examples")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).glob("**/*.md"))])
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
COMMANDS = get_command(gradfold.cli.app).commands
# What stands for something of the reader's own.
STAND_INS = {"WORKLOAD": "digits", "DIR": ".", "N": "64", "ARGS": "--lr 1", "[": "", "]": ""}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(gradfold.__path__, "gradfold.")
    if not module.name.endswith("__main__") and not module.name.startswith("gradfold.cli")
)


def breaches(check: Callable[[str], None], names: Iterable[str]) -> dict[str, str]:
    """The names that a check fails for, with its errors."""
    found = {}
    for name in names:
        torch.manual_seed(0)
        try:
            check(name)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_examples_in_docstrings_run():
    def run(module):
        assert not doctest.testmod(importlib.import_module(module)).failed

    assert breaches(run, MODULES) == {}


def test_python_blocks_run():
    def run(page):
        namespace: dict[str, object] = {}
        for block in re.findall(r"```python\n(.*?)```", TEXTS[page], flags=re.DOTALL):
            exec(compile(block, page, "exec"), namespace)  # blocks of a page build on each other

    assert breaches(run, TEXTS) == {}


def test_fragments_of_python_are_python():
    def parse(page):
        for block in re.findall(r"```py\n(.*?)```", TEXTS[page], flags=re.DOTALL):
            ast.parse(block)

    assert breaches(parse, TEXTS) == {}


def commands_in(text):
    """What stands between backticks or in an indented line, from `gradfold` or `torchrun -m gradfold` on."""
    return re.findall(r"(?:`|^    )(?:torchrun -m )?gradfold ([^`\n]+?)(?:`|  +#.*|$)", text, flags=re.MULTILINE)


def check_command(command):
    line = re.sub(r"\|[\w|]+", "", command)  # of alternatives the first
    for stand_in, meant in STAND_INS.items():
        line = re.sub(rf"(?<!\w){re.escape(stand_in)}(?!\w)", meant, line) if meant else line.replace(stand_in, "")
    name, *arguments = shlex.split(line)
    if name == "...":
        return
    assert name in COMMANDS
    if name in ("verify", "plan", "doctor") and (not arguments or arguments[0].startswith("-")):
        arguments = ["digits", *arguments]  # where only an option is spoken of
    if name == "plan" and "--memory" not in arguments:
        arguments += ["--memory", "1GiB"]
    COMMANDS[name].make_context(name, arguments)  # raises click's UsageError


def test_commands_parse():
    texts = [*TEXTS.values(), *(command.epilog or "" for command in COMMANDS.values())]
    commands = {command for text in texts for command in commands_in(text)}
    assert commands and breaches(check_command, commands) == {}


def test_commands_are_found_where_they_stand():
    text = "run `gradfold plan WORKLOAD --memory 1GiB [--global-batch N]`, or\n\n    gradfold compare  # all of it\n"
    assert commands_in(text) == ["plan WORKLOAD --memory 1GiB [--global-batch N]", "compare"]


def test_the_lists_of_examples_and_benchmarks_are_whole():
    def linked(folder):
        return set(re.findall(r"\]\(([^)]+)\)", TEXTS[f"{folder}/README.md"]))

    assert {path.name for path in (ROOT / "examples").glob("*.py")} == linked("examples")
    questions = {f"{page.parent.name}/README.md" for page in (ROOT / "benchmarks").glob("*/README.md")}
    assert questions == linked("benchmarks") - {"paired.py"}


def test_local_links_lead_somewhere():
    def follow(page):
        for link, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", TEXTS[page]):
            if "://" in link:
                continue
            target = (ROOT / page).parent / link if link else ROOT / page
            assert target.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]

    assert breaches(follow, TEXTS) == {}
