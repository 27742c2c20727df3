"""Batching: which rows of a batch belong together, so that no micro-batch has one of them without the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, final

from torch import Tensor

from gradfold.batch.cutting import take_rows
from gradfold.batch.nesting import Batch
from gradfold.batch.rows import Rows, num_rows
from gradfold.errors import BatchError, OptionError

__all__ = ["Batching", "Grouped", "Stacked"]


class Batching(ABC):
    """How a batch is split: subclass it to say which rows belong together.

    Where rows are not dim 0 of tensors, say also how many there are, and take some. With `collate=` a batch is a list
    of samples, and `num_rows` and `take` are not asked.

    >>> import gradfold, torch
    >>> class Halves(gradfold.Batching):
    ...     def groups(self, batch, total):
    ...         return [range(total // 2), range(total // 2, total)]
    >>> loss_fn = lambda model, rows: model(rows).mean()
    >>> accumulator = gradfold.Accumulator(torch.nn.Linear(2, 1), loss_fn, micro_batch_size=4, batching=Halves())
    >>> accumulator.backward(torch.randn(6, 2)).num_micro_batches
    2
    """

    def num_rows(self, batch: Batch) -> int:
        """The rows of a batch."""
        return num_rows(batch)

    @abstractmethod
    def groups(self, batch: Batch, total: int) -> Sequence[Rows]:
        """The rows that belong together, for each group; every row of the `total` of a batch is in one."""

    def take(self, batch: Batch, rows: Rows) -> Batch:
        """A batch of these rows, of whole groups, in ascending order."""
        return take_rows(batch, rows)


@final
@dataclass(frozen=True)
class Grouped(Batching):
    """Rows that follow each other belong together: so many, or those of one value in a column.

    Args:
        by: rows per group (`Grouped(4)`: rows 4i to 4i + 3), or the key of a column with equal values in the rows of a
            group (`Grouped("prompt_id")`), of any number.

    Raises:
        OptionError: it is neither.

    >>> import gradfold, torch
    >>> [list(rows) for rows in gradfold.Grouped(2).groups(torch.zeros(4), 4)]
    [[0, 1], [2, 3]]
    >>> [list(rows) for rows in gradfold.Grouped("id").groups({"id": torch.tensor([7, 7, 7, 9])}, 4)]
    [[0, 1, 2], [3]]
    """

    by: int | str

    def __post_init__(self) -> None:
        is_number = isinstance(self.by, int) and not isinstance(self.by, bool) and self.by >= 1
        if not is_number and not isinstance(self.by, str):
            raise OptionError(f"Grouped({self.by!r}); expected the rows per group, or the key of a column.")

    def groups(self, batch: Batch, total: int) -> Sequence[Rows]:
        """Runs of rows; raises BatchError where there is no such column, or rows are left."""
        if isinstance(self.by, int):
            if total % self.by:
                raise BatchError(
                    f"{self} takes groups of {self.by} rows, and the batch has {total}, so {total % self.by} are left. "
                    "Let the loader leave groups whole (drop_last=True), or group by a column."
                )
            return [range(start, start + self.by) for start in range(0, total, self.by)]
        keys = [_key_of(one) for one in _column(batch, self.by, total)]
        ends, start = [], 0
        for _, run in groupby(keys):
            stop = start + len(list(run))
            ends.append(range(start, stop))
            start = stop
        if len({keys[rows.start] for rows in ends}) < len(ends):
            raise BatchError(
                f"{self}: rows of one value do not follow each other, so they would be taken for several groups. Sort "
                "the rows by that column."
            )
        return ends


@final
@dataclass(frozen=True)
class Stacked(Batching):
    """Dim 0 is several blocks of n rows: rows i, n + i, 2n + i, ... belong together, as in `cat([chosen, rejected])`.

    Args:
        blocks: how many.

    Raises:
        OptionError: it is less than 2.

    >>> import gradfold, torch
    >>> gradfold.Stacked(2).groups(torch.zeros(6), 6)
    [(0, 3), (1, 4), (2, 5)]
    """

    blocks: int

    def __post_init__(self) -> None:
        if isinstance(self.blocks, bool) or not isinstance(self.blocks, int) or self.blocks < 2:
            raise OptionError(f"Stacked({self.blocks!r}); expected the number of blocks, at least 2.")

    def groups(self, batch: Batch, total: int) -> Sequence[Rows]:
        """One row of each block; raises BatchError where blocks have no equal sizes."""
        if total % self.blocks:
            raise BatchError(f"{self} takes {self.blocks} blocks of equal size, and the batch has {total} rows.")
        size = total // self.blocks
        return [tuple(range(first, total, size)) for first in range(size)]


def _column(batch: Batch, key: str, total: int) -> Sequence[Any]:
    """The values of a column, by row; of a list of samples, those of each."""
    try:
        found = [sample[key] for sample in batch] if isinstance(batch, list) else batch[key]
    except (KeyError, TypeError, IndexError, AttributeError):
        raise BatchError(f"Grouped({key!r}) finds no {key!r} in a batch that is a {type(batch).__name__}.") from None
    if len(found) != total:
        raise BatchError(f"Grouped({key!r}): the column has {len(found)} values for {total} rows.")
    return found.tolist() if isinstance(found, Tensor) else found


def _key_of(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else tuple(value) if isinstance(value, list) else value


def check_groups(batching: Batching, groups: Sequence[Rows], total: int) -> None:
    """Raise BatchError where a row is in no group, or in two."""
    rows = sorted(row for group in groups for row in group)
    if rows != list(range(total)):
        raise BatchError(
            f"{type(batching).__name__}.groups gave {len(rows)} rows for a batch of {total}; expected each one once."
        )


def rows_together(batching: object) -> Batching | None:
    """What says which rows belong together, where `batching=` is such."""
    return batching if isinstance(batching, Batching) else None
