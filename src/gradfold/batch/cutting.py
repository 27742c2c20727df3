"""Cutting a batch by its rows, taking some of them, and joining batches again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, equal, is_container, rebuilt
from gradfold.batch.own_rows import Memo, keeper_of
from gradfold.batch.rows import Rows, check_counts, count_rows, has_entry_per_row
from gradfold.errors import BatchError

Fn = Callable[[Any], Any]


class RowCut:
    """A batch in parts of these numbers of rows, as views; each has a copy of every 0-d tensor, which it may change.

    Attributes:
        parts: those.
        is_new: whether every tensor of them was made for them, so that a written one is known by its version.
    """

    def __init__(self, batch: Batch, sizes: Sequence[int]) -> None:
        self.is_new = True
        self._sizes = sizes
        self._cuts: dict[int, tuple[Any, Sequence[Any]]] = {}  # what a batch holds twice, its parts hold twice
        self._memo: Memo = {}
        total = sum(sizes)
        self.parts = [_mapped(batch, total, partial(self._part, index)) for index in range(len(sizes))]

    def _part(self, index: int, leaf: Any) -> Any:
        if id(leaf) not in self._cuts:
            self._cuts[id(leaf)] = leaf, self._cut(leaf)  # with the leaf, since it is known by its id
        return self._cuts[id(leaf)][1][index]

    def _cut(self, leaf: Any) -> Sequence[Any]:
        keeper, rows = keeper_of(leaf), _ranges(self._sizes)
        if keeper is None and isinstance(leaf, Tensor):
            return _cut(leaf, self._sizes)
        self.is_new = False
        if keeper is None:
            return [leaf[own.start : own.stop] for own in rows]
        return [keeper.take(leaf, own, self._memo) if own else None for own in rows]


def cut_rows(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """Cut into parts of these numbers of rows: see `RowCut`."""
    return RowCut(batch, sizes).parts


def _ranges(sizes: Sequence[int]) -> list[range]:
    return [range(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True)]


def _cut(tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    if tensor.dim() == 0:
        return [tensor.clone() for _ in sizes]
    if tensor.is_sparse:
        return [tensor.narrow_copy(0, own.start, len(own)) for own in _ranges(sizes)]
    # Autograd knows these parts as separate tensors that share memory, so a model may change its input in
    # place, as it may with a whole batch. With slices the first such change would tie all of them to its graph.
    parts: Sequence[Tensor] = torch.unsafe_split_with_sizes(tensor, sizes)
    return parts


def _mapped(batch: Batch, total: int, of_rows: Fn, of_rest: Fn = lambda leaf: leaf) -> Batch:
    """Rebuild a batch of so many rows with `of_rows(part)` for what has one entry for each, and for 0-d tensors."""
    return _visit(batch, total, of_rows, of_rest, batch)


def _visit(batch: Batch, total: int, of_rows: Fn, of_rest: Fn, node: Any) -> Any:
    """A part of a batch; no closure, which would refer to itself and hold tensors until garbage is collected."""
    keeper = keeper_of(node)
    if keeper is not None and keeper.count(node) == total:
        return of_rows(node)
    if isinstance(node, Tensor) or (node is not batch and has_entry_per_row(node, total)):
        return of_rows(node)
    return rebuilt(partial(_visit, batch, total, of_rows, of_rest), node) if is_container(node) else of_rest(node)


def take_rows(batch: Batch, rows: Rows) -> Batch:
    """A batch of these rows, copied; with a copy of every 0-d tensor, which it may change."""
    index = torch.tensor(list(rows))
    taken: dict[int, tuple[Any, Any]] = {}  # what a batch holds twice, its parts hold twice
    memo: Memo = {}

    def select(leaf: Any) -> Any:
        if (keeper := keeper_of(leaf)) is not None:
            return keeper.take(leaf, rows, memo)
        if isinstance(leaf, Tensor):
            return leaf.index_select(0, index.to(leaf.device)) if leaf.dim() else leaf.clone()
        return type(leaf)([leaf[row] for row in rows])

    def take(leaf: Any) -> Any:
        if id(leaf) not in taken:
            taken[id(leaf)] = leaf, select(leaf)
        return taken[id(leaf)][1]

    return _mapped(batch, count_rows(batch) or -1, take)


def join_rows(batches: Sequence[Batch], takes_first: bool = False) -> Batch:
    """Batches of one nesting as one, row after row: the opposite of `cut_rows`.

    Raises:
        BatchError: they are not alike, or what is the same for every row of one is not so for all, unless it is to be
            taken from the first.
    """
    totals = [_total_of(batch, takes_first) for batch in batches]
    leaves = [_leaves_of(batch, total) for batch, total in zip(batches, totals, strict=True)]
    if len({len(one) for one in leaves}) > 1:
        raise BatchError("batches of different structure cannot be joined")
    columns = zip(*leaves, strict=True)
    memo: Memo = {}

    def join(first: Any) -> Any:
        column = next(columns)
        if isinstance(first, Tensor) and not first.dim():
            return share(first, column)
        try:
            if (keeper := keeper_of(first)) is not None:
                return keeper.join(column, memo)
            return torch.cat(column) if isinstance(first, Tensor) else type(first)(chain(*column))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise BatchError(f"batches cannot be joined ({error})") from error

    def share(first: Any, column: Sequence[Any]) -> Any:
        if takes_first or all(equal(first, other) for other in column):
            return first
        raise BatchError("what all rows share differs between batches, so they cannot be joined")

    return _mapped(batches[0], totals[0], join, lambda first: share(first, next(columns)))


def _total_of(batch: Batch, takes_first: bool) -> int:
    total = count_rows(batch)
    if total is None:
        raise BatchError("batches whose rows cannot be counted cannot be joined")
    if not takes_first:
        check_counts(batch, total)
    return total


def _leaves_of(batch: Batch, total: int) -> list[Any]:
    leaves: list[Any] = []

    def note(leaf: Any) -> Any:
        leaves.append(leaf)
        return leaf

    _mapped(batch, total, note, note)
    return leaves
