"""Writes docs/what-is-equal.md from the zoo: `PYTHONPATH=tests python -m zoo.page`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from zoo import RIGHT, UNKNOWABLE, WRONG, Case

PAGE = Path(__file__).parents[2] / "docs" / "what-is-equal.md"

INTRO = """\
# Is my loss safe to accumulate?

gradfold splits a batch into micro-batches and multiplies the mean loss of each by its part of the total weight. That is
the batch's gradient if, and only if, **the loss is a mean over independent things**, and `weight=` counts those things:
samples, tokens, boxes. A mean over rows is safe, whatever happens within a row. A ratio of two sums over rows, a root
of a mean, a softmax, a rank or a statistic over rows is not, unless the weight is what it divides by.

Two questions settle most cases:

1. *If I delete the other rows of the batch, does the loss of this row change, before the division?* Then rows depend on
   each other, and no weight helps.
2. *What does the mean divide by?* That number, counted per micro-batch, is the `weight=`. A sum, also one that is
   divided by a count of the whole batch, has `weight="sum"`: then the losses of micro-batches add up.

The self-check answers them, too. In the first window of several micro-batches it runs the first one whole and in two
unequal parts, and compares gradients. Before it refuses a loss as coupled it runs two micro-batches together and each
by itself, since parts that no micro-batch would be prove nothing. It raises `NotDecomposableError` with the cause,
warns if something hides the answer, and is silent otherwise.

Every line below is a test of what gradfold says. That a set-up is equal or not is also shown in plain torch, by a
hand-written loop in float64 against the whole batch (except SyncBatchNorm, which needs a GPU). The set-ups are in
[tests/zoo](../tests/zoo); `PYTHONPATH=tests python -m zoo.page` makes this page from them.
"""

WRONG_TEXT = """
## What is not equal

{wrong} set-ups. `NotDecomposableError` has a `.cause`:

- `weights`: another weighting fits; the message names it if it is found.
- `sum`: not a mean.
- `mean`: not a sum, though weighted by "sum".
- `coupled`: rows depend on each other.
- `batch_norm`: rows depend on each other through BatchNorm in functional form.
- `state`: a forward pass changes a state that the next one uses.
- `grad_output`: the backward pass ignores its incoming gradient.
- `empty`: a part is a mean over nothing.
"""

RIGHT_TEXT = """
## What is equal

{right} set-ups. In those marked *drawn*, the model or the loss draws random numbers. The draws differ when the batch
is split, as they differ from one random seed to another: the gradient is right in distribution, not number for number.
The self-check gives each row the same draws in the whole and in the parts, to compare them.
"""

UNKNOWABLE_TEXT = """
## What cannot be known

{unknowable} set-ups. If something hides the answer, gradfold warns once. If there is nothing to compare, it is
silent, which proves nothing: `gradfold.verify(accumulator, batch)` checks a whole batch, in float64.
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
