"""A verdict: whether the accumulated gradient is the whole batch's, the figures, and the causes where it is not."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gradfold.engine.result import Unit
from gradfold.errors import NotDecomposableError

__all__ = ["Verdict"]

_MOST_ROWS = 10  # of the table of parameters
_WIDTH = 100


@dataclass(frozen=True)
class Cause:
    """Why the law does not hold.

    The names are those of `NotDecomposableError`, and "random" (numbers that cannot be handed to rows, or two runs that
    differ), "ranks" (right in one process, and not on several), "other_model" (`loss_fn` uses another model),
    "non_finite" (the whole batch's loss is NaN or infinite), "fails" (micro-batches raise an error), "padding" (a token
    budget pads less), "rounding" (it hides the answer), "unknown".
    """

    name: str
    text: str  # what was found, and what to write
    term: str = "loss"  # name of the loss term ("loss" for a bare one)
    weight: str | None = None  # that fits, as Python, where one was found
    layers: tuple[str, ...] = ()  # names of those where it happens, where known


@dataclass(frozen=True)
class SizeRow:
    """The gradient with micro-batches of one size."""

    size: int  # rows of a micro-batch, or with a `TokenBudget` its padded tokens, at most
    unit: Unit
    num_micro_batches: int
    error: float  # relative, over all parameters; NaN where there is none
    failure: str | None = None  # what was raised instead, or what else is wrong
    num_ranks: int = 1  # that ran them together

    def cells(self) -> list[str]:
        """For a table."""
        size = str(self.size) if self.unit == "rows" else f"{self.size} tokens"
        on_ranks = f" on each of {self.num_ranks} ranks" if self.num_ranks > 1 else ""
        error = number(self.error) if self.failure is None else textwrap.shorten(self.failure, _WIDTH - 30)
        return [size, f"{self.num_micro_batches}{on_ranks}", error]


@dataclass(frozen=True)
class ParameterRow:
    """The gradient of one parameter, at the size of micro-batches with the largest error."""

    name: str
    shape: tuple[int, ...]
    norm: float  # of the whole batch's gradient; 0 where it has none
    error: float  # relative to that norm, or to a billionth of the norm over all parameters where that is larger

    def cells(self) -> list[str]:
        """For a table."""
        return [self.name, "x".join(map(str, self.shape)) or "scalar", f"{self.norm:.2e}", number(self.error)]


@dataclass(frozen=True)
class Verdict:
    """What `gradfold.verify` found; `print(verdict)` says it in words.

    Attributes:
        ok: whether the law was seen to hold, at every size that ran.
        max_relative_error: `||g - ref|| / ||ref||` over all parameters, at the worst size; NaN where nothing was
            compared.
        rows: one per parameter (`name`, `shape`, `norm`, `error`), in the model's order.
        sizes: one per size of micro-batches (`size`, `num_micro_batches`, `error`, `failure`).
        tolerance: the largest error that rounding explains.
        noise_floor: how far the whole batch's gradient moves when every parameter is off by a few rounding errors.
        dtype: the precision of the copy that was run.
        precision: the lowest precision met between parameters and loss, which sets the tolerance.
        num_rows: rows of the batch.
        causes: why it does not hold (`name`, `text`); none where it does.
        notes: what else to know: what was frozen, or fell back.
    """

    ok: bool
    max_relative_error: float
    rows: tuple[ParameterRow, ...]
    sizes: tuple[SizeRow, ...]
    tolerance: float
    noise_floor: float
    dtype: torch.dtype
    precision: torch.dtype
    num_rows: int
    causes: tuple[Cause, ...] = ()
    notes: tuple[str, ...] = ()

    def raise_if_wrong(self) -> None:
        """Do nothing where the law holds.

        Raises:
            NotDecomposableError: it does not, or that could not be proved; `.cause` is the name of the first cause.
        """
        if not self.ok:
            first = self.causes[0]
            raise NotDecomposableError(str(self), first.name, first.term, first.weight)

    def to_dict(self) -> dict[str, Any]:
        """The verdict in plain values, for JSON: None stands for a number that is not finite."""
        found = asdict(self, dict_factory=_plain)
        found["parameters"] = found.pop("rows")
        return found

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        off = f"{number(self.max_relative_error)} off"
        if self.ok:
            return f"EXACT: the accumulated gradient is that of the whole batch ({off} at most)."
        if math.isnan(self.max_relative_error):
            return "INCONCLUSIVE: nothing could be compared."
        if self.causes[0].name in ("random", "rounding", "fails"):
            return f"INCONCLUSIVE: the accumulated gradient may or may not be that of the whole batch ({off} at worst)."
        return f"NOT EXACT: the accumulated gradient is not that of the whole batch ({off} at worst)."

    @property
    def precision_line(self) -> str:
        """How exact it could be."""
        lower = "" if self.precision == self.dtype else f", with {name_of(self.precision)} on the way"
        return (
            f"{self.num_rows} rows, run in {name_of(self.dtype)}{lower}. Allowed: {number(self.tolerance)}. "
            f"Rounding of the parameters alone: {number(self.noise_floor)}."
        )

    @property
    def worst(self) -> tuple[ParameterRow, ...]:
        """The parameters with the largest errors, at most 10, the worst first."""
        return tuple(sorted(self.rows, key=lambda row: row.error, reverse=True)[:_MOST_ROWS])

    @property
    def num_hidden(self) -> int:
        """How many parameters are not among the worst."""
        return len(self.rows) - len(self.worst)

    def __str__(self) -> str:
        lines = [self.headline]
        for cause in self.causes:
            lines += ["", *_wrapped(f"Cause: {cause.name}", cause.text)]
        for note in self.notes:
            lines += ["", *_wrapped("Note", note)]
        if self.sizes:
            lines += ["", *_table(["micro-batch", "how many", "error"], self.sizes)]
        if not math.isnan(self.noise_floor):
            lines += ["", *textwrap.wrap(self.precision_line, _WIDTH)]
        if self.rows:
            lines += ["", *_table(["parameter", "shape", "norm", "error"], self.worst)]
            if self.num_hidden:
                lines.append(f"  and {self.num_hidden} more with smaller errors")
        return "\n".join(lines)


def number(value: float) -> str:
    """An error as people read it: 2.1e-16, or 23.4 %."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinitely"
    if value < 1e-3:
        return f"{value:.1e}" if value else "0"
    return f"{value:.1%}".replace("%", " %") if value < 10 else f"{value:.3g} times"


def name_of(dtype: torch.dtype) -> str:
    """A dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def _wrapped(title: str, text: str) -> list[str]:
    """A title, and its text below with each of its lines wrapped."""
    lines = [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, _WIDTH - 2)]
    return [title, *(f"  {line}" for line in lines)]


def _table(headings: list[str], rows: Iterable[SizeRow | ParameterRow]) -> list[str]:
    every = [headings, *(row.cells() for row in rows)]
    widths = [max(len(row[column]) for row in every) for column in range(len(headings))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every
    ]


def _plain(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a dataclass as JSON has them."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return name_of(value)
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: plain(value) for name, value in fields}
