"""The style of messages and docstrings: phrases and spellings that docs/style.md has a better form for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "gradfold"
PAGES = [
    path
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("[be]*/**/README.md")])
    if path.name != "style.md"  # which shows the bad forms
]

PHRASES = [
    r"do(es)? not go with",
    r"go together",
    r"(?<!there\s)(is|are) no (?!longer|larger|later|other|more)\w+",
    r"nobody",
    r"somebody",
    r"anew",
    r"(?-i:none) (is|are)",  # None is a value
    r"memory (that )?(runs|ran|has run) out",
    r"(run|ran|runs|running) out of memory",
    r"of (one's|his|its user's) own",
    r"as it is given",
    r"put together",
    r"one below the other",
    r"to blame",
    r"culprit",
    r"rows of like length",
]
# As stems, since exercise, precise and otherwise are American, too.
IZE = (
    "normal|initial|final|real|recogn|synchron|organ|minim|maxim|optim|special|summar|serial|regular|parallel|standard|"
    "random|general|visual|util|categor|penal|local|vector|token|factor|custom|character|finger|discret|author|critic"
)
BRITISH = [
    rf"\w*({IZE})is(e|ed|es|er|ers|ing|ation|ations)",
    r"\w*(behavi|neighb|fav|col|hon|lab)our\w*",
    r"(centre|metre|fibre|programme|catalogue|analyse)[ds]?",
    r"(model|label|cancel|travel)l(ed|ing)",
    r"grey",
]
# A phrase may stand across a line break.
WORSE = re.compile(
    "|".join(rf"\b(?:{pattern})\b" for pattern in [*PHRASES, *BRITISH]).replace(" ", r"\s+"), re.IGNORECASE
)


def texts_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Docstrings and string literals, those within f-strings included, each with its first line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def offenses(text: str, first_line: int) -> Iterator[tuple[int, str]]:
    """What is worse than it could be, with its line."""
    for found in WORSE.finditer(text):
        yield first_line + text.count("\n", 0, found.start()), re.sub(r"\s+", " ", found.group())


def test_messages_and_docstrings_use_the_better_form():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {phrase}"
        for path in sorted(SOURCE.rglob("*.py"))
        for first, text in texts_of(ast.parse(path.read_text()))
        for line, phrase in offenses(text, first)
    ]
    assert found == []


def test_pages_use_the_better_form():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {phrase}" for path in PAGES for line, phrase in offenses(path.read_text(), 1)
    ]
    assert found == []


def test_what_is_found_and_what_is_not():
    def phrases(text):
        return [phrase for _, phrase in offenses(text, 1)]

    text = "X does not go\nwith Y; this is no state; normalise it anew, with 3 neighbours"
    assert phrases(text) == ["does not go with", "is no state", "normalise", "anew", "neighbours"]
    assert phrases("There is no rank. It is no longer used; None is returned. Precise otherwise, as four labels.") == []
