"""A split: a global batch cut into nearly equal micro-batches, by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, cut_rows, every_leaf, rows_if_any
from gradfold.batch.rows import Rows, name_rows, num_rows, shift_rows
from gradfold.errors import BatchError, OptionError

__all__: list[str] = []

Collate = Callable[[list[Any]], Batch]

CollateRows = Callable[[Rows], Batch]
"""Collates these rows of the global batch, which is a list of samples."""


class MicroBatch(NamedTuple):
    """What is run at once: some rows of the global batch (on the host), and which.

    Attributes:
        data: what `loss_fn` takes.
        rows: where they are in the batch, in the order in which they stand in `data`; empty where nobody has counted.
        is_cut: whether every tensor with rows is a view or copy that was made for this micro-batch.
        width: the padded length of its rows, at least 1, where padded tokens are what is limited; None where rows are.
    """

    data: Batch
    rows: Rows
    is_cut: bool = False
    width: int | None = None

    @property
    def size(self) -> int:
        """What is limited: padded tokens, or rows."""
        return len(self.rows) * (self.width or 1)

    @property
    def where(self) -> str:
        """The rows, for a message."""
        return f" ({name_rows(self.rows)})" if self.rows else ""


def versions(part: MicroBatch) -> list[int]:
    """The version counters of the tensors with rows, which tell whether somebody has written to them."""
    leaves = [leaf for leaf in every_leaf(part.data) if isinstance(leaf, Tensor) and leaf.dim()]
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves]


def check_size(micro_batch_size: int | None) -> None:
    """Raise OptionError unless the size is None or a whole number of at least 1."""
    if micro_batch_size is None:
        return
    if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int):
        raise OptionError(
            f"micro_batch_size={micro_batch_size!r} is a {type(micro_batch_size).__name__}; expected the number of "
            "rows to run at once (an int of at least 1), or None for the batch as it is given."
        )
    if micro_batch_size < 1:
        raise OptionError(f"micro_batch_size={micro_batch_size}; expected at least 1 row.")


@lru_cache(maxsize=64)
def cut_range(total: int, micro_batch_size: int | None) -> tuple[range, ...]:
    """Cut `total` rows into k = ceil(total / size) ranges whose sizes differ by at most one.

    At most two sizes, and so two shapes, occur. `torch.chunk` is not this: 33 rows in 8 chunks give 7.

    >>> [len(rows) for rows in cut_range(33, 5)]
    [5, 5, 5, 5, 5, 4, 4]
    """
    if micro_batch_size is None or micro_batch_size >= total:
        return (range(total),)
    num_parts = -(-total // micro_batch_size)
    size, num_larger = divmod(total, num_parts)
    bounds = [index * size + min(index, num_larger) for index in range(num_parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def split_rows(batch: Batch, micro_batch_size: int | None) -> list[MicroBatch]:
    """Cut a nesting of tensors; micro-batches are views of it."""
    ranges = cut_range(num_rows(batch), micro_batch_size)
    if len(ranges) == 1:
        return [MicroBatch(batch, ranges[0])]
    return list(map(MicroBatch, cut_rows(batch, [len(rows) for rows in ranges]), ranges, repeat(True)))


def split_samples(samples: Sequence[Any], micro_batch_size: int | None, collate: Collate) -> list[MicroBatch]:
    """Cut a list of samples and collate each part.

    All parts are collated at once: a weight may be needed of each before the first backward, and a collate function
    that draws random numbers must not run again when a part is replayed.
    """
    if isinstance(samples, str | bytes) or not isinstance(samples, Sequence):
        raise BatchError(
            f"with collate=, the batch must be a list of samples; got a {type(samples).__name__}. Let the loader give "
            "lists: DataLoader(..., collate_fn=list)."
        )
    if not samples:
        raise BatchError("the batch is an empty list of samples. Skip empty batches before calling backward().")
    ranges = cut_range(len(samples), micro_batch_size)
    return [MicroBatch(collate(list(samples[rows.start : rows.stop])), rows) for rows in ranges]


def check_collated(micro_batches: Iterable[MicroBatch]) -> None:
    """Raise BatchError where collation changed the number of samples, which then cannot be the weight."""
    for index, part in enumerate(micro_batches):
        rows = rows_if_any(part.data)
        if rows is not None and rows != len(part.rows):
            raise BatchError(
                f"collate made {rows} rows of the {len(part.rows)} samples of micro-batch {index}{part.where}, so it "
                'is unclear what weight="samples" should count. Give weight= what the loss is a mean over: '
                "gradfold.token_count(...), or a callable such as lambda batch: len(batch[0])."
            )


def recut(part: MicroBatch, micro_batch_size: int, collate_rows: CollateRows | None) -> list[MicroBatch]:
    """Cut a micro-batch into such of this size at most, or of one row.

    The rows stay as they were collated, unless only collation can cut them.

    Raises:
        BatchError: it cannot be cut.
    """
    ranges = cut_range(len(part.rows), max(1, micro_batch_size // (part.width or 1)))
    if len(ranges) == 1:
        return [part]
    rows = [part.rows[own.start : own.stop] for own in ranges]
    if collate_rows is not None and not _is_cut_by_rows(part, collate_rows):
        return [MicroBatch(collate_rows(own), own, False, part.width) for own in rows]
    parts = cut_rows(part.data, [len(own) for own in rows])
    return list(map(MicroBatch, parts, rows, repeat(True), repeat(part.width)))


def _is_cut_by_rows(part: MicroBatch, collate_rows: CollateRows) -> bool:
    """Whether all of it has one entry per row: a list of names beside the tensors would be passed on whole.

    Time may come first and be as long by accident, so one row is collated by itself; what that draws is drawn again.
    """
    try:
        if num_rows(part.data) != len(part.rows):
            return False
        with torch.random.fork_rng(devices=[]):
            return num_rows(collate_rows(part.rows[:1])) == 1
    except BatchError:
        return False


def join_batches(batches: Iterable[list[MicroBatch]]) -> list[MicroBatch]:
    """Number the rows of several split batches as one: the micro-batches of a window that came in pieces."""
    joined: list[MicroBatch] = []
    start = 0
    for micro_batches in batches:
        for piece in micro_batches:
            joined.append(piece._replace(rows=shift_rows(piece.rows, start)))
        start += sum(len(piece.rows) for piece in micro_batches)
    return joined
