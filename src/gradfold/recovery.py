"""A recovery: what was done in a window about memory that ran out, or about a gradient that was not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from gradfold.rows import Rows, name_rows

__all__ = ["Recovery"]

Unit: TypeAlias = Literal["rows", "padded tokens"]


@dataclass(frozen=True)
class Recovery:
    """One fault that a window survived.

    Attributes:
        cause: "out_of_memory" or "non_finite".
        action: "halved" (more, smaller micro-batches), "skipped_micro_batch" (left out, its weight taken out of the
            denominator) or "skipped_update" (no gradient was left).
        rows: the rows of the batch where it happened.
        micro_batch_size: rows (padded tokens with a `TokenBudget`) run at once from there on; 0 where they were
            skipped.
        replayed: whether the window began again; else the micro-batches that were done were kept.
        changes_randomness: whether random numbers (dropout masks) are others than without the fault.
        changes_batch_statistics: whether BatchNorm layers normalised by other, smaller micro-batches.
        unit: what `micro_batch_size` counts.
    """

    cause: Literal["out_of_memory", "non_finite"]
    action: Literal["halved", "skipped_micro_batch", "skipped_update"]
    rows: Rows
    micro_batch_size: int
    replayed: bool
    changes_randomness: bool = False
    changes_batch_statistics: bool = False
    unit: Unit = "rows"

    def __str__(self) -> str:
        where = name_rows(self.rows)
        if self.action == "halved":
            unit = self.unit[:-1] if self.micro_batch_size == 1 else self.unit
            text = f"out of memory at {where}: went on with {self.micro_batch_size} {unit} at once"
        elif self.action == "skipped_micro_batch":
            text = f"the gradient of {where} was not finite: left out"
        else:
            text = f"the gradient of {where} was not finite: no update"
        changed = [
            name
            for name, has_changed in (
                ("random numbers", self.changes_randomness),
                ("BatchNorm's statistics", self.changes_batch_statistics),
            )
            if has_changed
        ]
        return text + (f" ({' and '.join(changed)} differ from those of a run without the fault)" if changed else "")
