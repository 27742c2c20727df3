"""What a window gives back besides the gradient: losses, metrics, and the faults that it survived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import compress
from typing import Literal, TypeAlias

from torch import Tensor

from gradfold.batch.rows import Rows, name_rows

__all__ = ["Recovery", "WindowResult"]

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
        changes_randomness: whether random numbers (dropout masks) differ from those of a run without the fault.
        changes_batch_statistics: whether BatchNorm layers normalized by other, smaller micro-batches.
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
            text = f"out of memory at {where}: continued with {self.micro_batch_size} {unit} at once"
        elif self.action == "skipped_micro_batch":
            text = f"the gradient of {where} was not finite: left out"
        else:
            text = f"the gradient of {where} was not finite: no update"
        names = ("random numbers", "BatchNorm's statistics")
        changed = list(compress(names, (self.changes_randomness, self.changes_batch_statistics)))
        return text + (f" ({' and '.join(changed)} differ from those of a run without the fault)" if changed else "")


@dataclass(frozen=True)
class WindowResult:
    """The result of a window, besides the gradient.

    Attributes:
        loss: the loss of the whole batch, of all ranks (the sum of its terms), 0-d, detached, on the device; NaN where
            the window has weight 0.
        metrics: by name: weighted means over all ranks (0-d), rows of this rank in the batch's own order, and the means
            of named loss terms.
        num_micro_batches: how many micro-batches were run on this rank.
        num_samples: rows of the batch of this rank.
        weight: the denominator of the loss, over all ranks, or one per term where weights were given by name; 1 with
            weight "sum".
        recoveries: the faults that the window survived, in order.
        is_skipped: whether the gradient was not finite and therefore dropped (`on_non_finite=`).
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    num_micro_batches: int
    num_samples: int
    weight: float | Mapping[str, float]
    recoveries: tuple[Recovery, ...] = ()
    is_skipped: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether the window has weight 0, and so left no gradient."""
        weights = self.weight.values() if isinstance(self.weight, Mapping) else [self.weight]
        return not any(weights)
