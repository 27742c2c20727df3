"""Splitting by groups: batches whose rows belong together, as a `Batching` says."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, final

from gradfold.batch.batching import Batching, check_groups
from gradfold.batch.nesting import Batch
from gradfold.batch.rows import Rows, shift_rows
from gradfold.batch.split import (
    Collate,
    CollateRows,
    MicroBatch,
    MicroBatcher,
    fill,
    in_groups,
    join_batches,
    num_samples,
)
from gradfold.errors import BatchError


@final
class GroupBatcher(MicroBatcher):
    """Splits batches into micro-batches of whole groups; see `MicroBatcher` for its arguments."""

    def __init__(
        self, batching: Batching, size: int | None, collate: Collate | None = None, counts_samples: bool = False
    ) -> None:
        super().__init__(size, collate, counts_samples)
        self._batching = batching
        self._pieces: list[Batch] = []  # of the last batch
        self._ends: list[int] = []  # of their rows

    def _split(self, batch: Batch, limit: int | None) -> list[MicroBatch]:
        self._remember([batch])
        return self._split_piece(batch, limit)

    def _split_pieces(self, pieces: Sequence[Batch], limit: int | None) -> list[MicroBatch]:
        self._remember(pieces)
        return join_batches([self._split_piece(piece, limit) for piece in pieces])

    def _remember(self, pieces: Sequence[Batch]) -> None:
        self._samples = [] if self._collate is None else [sample for piece in pieces for sample in piece]
        self._pieces, self._ends = list(pieces), list(accumulate(map(self._count, pieces)))

    def _count(self, piece: Batch) -> int:
        return self._batching.num_rows(piece) if self._collate is None else num_samples(piece)

    def _split_piece(self, piece: Batch, limit: int | None) -> list[MicroBatch]:
        total = self._count(piece)
        groups = self._batching.groups(piece, total)
        check_groups(self._batching, groups, total)
        largest = max(map(len, groups))
        if self.size is not None and largest > self.size:
            raise BatchError(
                f"a group of {largest} rows is larger than micro_batch_size={self.size}, and groups stay whole. Pass "
                f"micro_batch_size={largest} or more."
            )
        parts = fill(groups, limit)
        if len(parts) == 1 and self._collate is None:
            return [MicroBatch(piece, range(total), groups=groups)]
        return [in_groups(part, lambda rows: self._take(piece, rows)) for part in parts]

    def _take(self, piece: Any, rows: Rows) -> Batch:
        if self._collate is None:
            return self._batching.take(piece, rows)
        return self._collate([piece[row] for row in rows])

    @property
    def collate_rows(self) -> CollateRows | None:
        """What makes a batch of rows of the last one, which are whole groups."""
        return self._take_rows

    def _take_rows(self, rows: Rows) -> Batch:
        found = {bisect_right(self._ends, row) for row in rows}
        if len(found) > 1:
            raise BatchError("rows of several batches of a window cannot be joined")
        (number,) = found
        start = self._ends[number - 1] if number else 0
        return self._take(self._pieces[number], shift_rows(tuple(sorted(rows)), -start))
