"""Writes docs/what-is-equal.md from the zoo: `PYTHONPATH=tests python -m zoo.page`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from zoo import RIGHT, UNKNOWABLE, WRONG, Case

PAGE = Path(__file__).parents[2] / "docs" / "what-is-equal.md"

INTRO = """\
# Is my loss safe to accumulate?

gradfold cuts a batch into micro-batches and weights the mean loss of each by its share of the whole. That is the
batch's gradient if, and only if, **the loss is a mean over things that know nothing of each other**, and `weight=`
counts those things: samples, tokens, boxes. A mean over rows is safe, whatever happens within a row. A ratio of two
sums over rows, a root of a mean, a softmax, a rank or a statistic over rows is not, unless the weight is what it
divides by.

Two questions settle most cases:

1. *If I delete the other rows of the batch, does what this row says change, but for the division?* Then rows are
   coupled, and no weight helps.
2. *What does the mean divide by?* That number, counted per micro-batch, is the `weight=`.

You need not settle them alone. In the first window of several micro-batches gradfold runs the first one whole and in
two unequal parts, and compares gradients. It raises `NotDecomposableError` with the cause, warns where something hid
the answer, and is silent otherwise.

Every line below is a test: gradfold must say what stands there. What is said to be equal or not is also shown in plain
torch, by a hand-written loop in float64 against the whole batch (but for SyncBatchNorm, which needs a GPU). The set-ups
are in [tests/zoo](../tests/zoo); `PYTHONPATH=tests python -m zoo.page` makes this page from them.
"""

WRONG_TEXT = """
## What is not equal

{wrong} set-ups. `NotDecomposableError` has a `.cause`:

- `weights`: another weighting fits; the message names it where it can.
- `sum`: not a mean.
- `coupled`: rows depend on each other.
- `batch_norm`: rows depend on each other through BatchNorm in functional form.
- `state`: forward passes move a state that the next one uses.
- `seed`: the backward pass ignores the gradient that comes in.
- `empty`: a part is a mean over nothing.
"""

RIGHT_TEXT = """
## What is equal

{right} set-ups. In those marked *drawn*, numbers are drawn at random inside the model or the loss. The draws differ
when the batch is cut, as they differ from one seed to another: the gradient is right in distribution, not number for
number. gradfold gives each row the same draws in the whole and in the parts, to compare them.
"""

UNKNOWABLE_TEXT = """
## What cannot be known

{unknowable} set-ups. Where something hides the answer gradfold warns, once. Where there is nothing to see it is
silent, which is no proof: `gradfold.verify(accumulator, batch)` looks at a whole batch of yours, in float64.
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _says(case: Case) -> str:
    if case.guard == "wrong":
        return f"`NotDecomposableError`, `{case.cause}`"
    return {"refused": f"`{case.cause}`", "warns": "a warning", "undecided": "nothing"}[case.guard]


def render() -> str:
    """The page."""
    wrong = _table(
        ["set-up", "why not", "gradfold says", "write instead"],
        [(case.name, case.why, _says(case), case.remedy) for case in WRONG],
    )
    right = _table(["set-up", "why"], [(case.name + ("" if case.proof else " (*drawn*)"), case.why) for case in RIGHT])
    unknowable = _table(
        ["set-up", "why", "gradfold says", "what to do"],
        [(case.name, case.why, _says(case), case.remedy) for case in UNKNOWABLE],
    )
    text = INTRO + WRONG_TEXT + wrong + RIGHT_TEXT + right + UNKNOWABLE_TEXT + unknowable
    for name, cases in (("wrong", WRONG), ("right", RIGHT), ("unknowable", UNKNOWABLE)):
        text = text.replace(f"{{{name}}}", str(len(cases)))
    return text


if __name__ == "__main__":
    PAGE.write_text(render())
