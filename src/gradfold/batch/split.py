"""Splitting: how the global batches of an accumulator become micro-batches.

A `MicroBatcher` splits batch after batch and learns how much fits in memory: by rows, or by samples that are collated
per micro-batch. `packing.token_batcher` has one that splits by padded tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise, repeat
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from gradfold.batch.cutting import RowCut
from gradfold.batch.loaded_window import MicroBatchWindow
from gradfold.batch.nesting import Batch, structure
from gradfold.batch.rows import (
    COLOR_CHANNELS,
    Rows,
    check_counts,
    count_rows,
    holds_samples,
    name_rows,
    num_rows,
    rows_of_whole,
    shift_rows,
)
from gradfold.errors import BatchError, EmptyBatchError, OptionError

Collate = Callable[[list[Any]], Batch]

CollateRows = Callable[[Rows], Batch]
"""Collates these rows of the global batch, which is a list of samples."""


class MicroBatch(NamedTuple):
    """What is run at once: some rows of the global batch (on the host), and which."""

    data: Batch  # what `loss_fn` takes
    rows: Rows  # in the order of `data`
    is_cut: bool = False  # whether every tensor is a view or copy that was made for this micro-batch
    width: int | None = None  # the padded length of its rows, where padded tokens are what is limited
    groups: Sequence[Rows] | None = None  # of its rows, those that belong together; None: each stands for itself
    is_counted: bool = True  # else it counts as one row, and is never cut

    @property
    def size(self) -> int:
        """What is limited: padded tokens, or rows."""
        return len(self.rows) * (self.width or 1)

    @property
    def num_units(self) -> int:
        """Into how many micro-batches it could be split."""
        return len(self.rows if self.groups is None else self.groups)

    def some_rows(self, units: slice) -> Rows:
        """The rows of some rows or groups of it, in ascending order."""
        if self.groups is None:
            return self.rows[units]
        return tuple(sorted(row for group in self.groups[units] for row in group))

    @property
    def where(self) -> str:
        """The rows, for a message."""
        return f" ({name_rows(self.rows)})" if self.rows else ""


ROWS, _FORM = attrgetter("rows"), attrgetter("dtype", "ndim")


def check_size(micro_batch_size: int | None) -> None:
    """Raise OptionError unless the size is None or a whole number of at least 1."""
    is_int = isinstance(micro_batch_size, int) and not isinstance(micro_batch_size, bool)
    if micro_batch_size is not None and not (is_int and micro_batch_size >= 1):
        raise OptionError(
            f"micro_batch_size={micro_batch_size!r} is a {type(micro_batch_size).__name__}; expected the number of "
            'rows to run at once (an int of at least 1), "auto", a gradfold.Auto, or None for the whole batch at once.'
        )


@lru_cache(maxsize=64)
def cut_range(total: int, micro_batch_size: int | None, is_even: bool = False) -> tuple[range, ...]:
    """Cut `total` rows into ranges of this size, the last of what is left; or into as many that differ by one at most.

    >>> [len(rows) for rows in cut_range(33, 8)], [len(rows) for rows in cut_range(33, 8, is_even=True)]
    ([8, 8, 8, 8, 1], [7, 7, 7, 6, 6])
    """
    if micro_batch_size is None or micro_batch_size >= total:
        return (range(total),)
    if not is_even:
        starts = range(0, total, micro_batch_size)
        return tuple(range(start, min(start + micro_batch_size, total)) for start in starts)
    num_parts = -(-total // micro_batch_size)
    size, num_larger = divmod(total, num_parts)
    bounds = [index * size + min(index, num_larger) for index in range(num_parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(bounds))


def form_of(batch: Batch) -> Hashable:
    """What tells batches of one loader from others, whatever their sizes."""
    if type(batch) is tuple and set(map(type, batch)) == {Tensor}:  # the usual case, faster
        return tuple(map(_FORM, batch))
    return structure(batch)


def _split_pair(batch: Batch, micro_batch_size: int | None, is_even: bool) -> list[MicroBatch] | None:
    """Split one or two plain tensors in a tuple or list, the usual case, without a walk; None for any other batch."""
    kind = type(batch)
    if (kind is not tuple and kind is not list) or not 0 < len(batch) <= 2:
        return None
    for leaf in batch:
        if type(leaf) is not Tensor or leaf.dim() == 0 or leaf.layout is not torch.strided or leaf.is_nested:
            return None
    total = batch[0].shape[0]
    if total == 0 or batch[-1].shape[0] != total or (total in COLOR_CHANNELS and batch[0].dim() == 3):
        return None
    ranges = cut_range(total, micro_batch_size, is_even)
    if len(ranges) == 1:
        return [MicroBatch(batch, ranges[0])]
    columns = map(torch.unsafe_split_with_sizes, batch, repeat(list(map(len, ranges))))  # as in `cut_rows`
    return list(map(MicroBatch, map(kind, zip(*columns, strict=True)), ranges, repeat(True)))


def split_rows(batch: Batch, micro_batch_size: int | None, is_even: bool = False) -> list[MicroBatch]:
    """Split a nesting of tensors; micro-batches are views of it."""
    try:
        total = num_rows(batch)
    except EmptyBatchError:
        raise
    except BatchError:
        rows = rows_of_whole(batch)
        if micro_batch_size is not None and (rows is None or rows > micro_batch_size):
            raise
        return [MicroBatch(batch, range(rows or 1), is_counted=rows is not None)]
    ranges = cut_range(total, micro_batch_size, is_even)
    if len(ranges) == 1:
        return [MicroBatch(batch, ranges[0])]
    check_counts(batch, total)
    cut = RowCut(batch, list(map(len, ranges)))
    return list(map(MicroBatch, cut.parts, ranges, repeat(cut.is_new)))


def check_counted(micro_batches: Iterable[MicroBatch]) -> None:
    """Raise BatchError where there is a micro-batch whose samples cannot be counted, and they are the weight."""
    for part in micro_batches:
        if not part.is_counted:
            try:
                num_rows(part.data)
            except BatchError as error:
                raise BatchError(
                    f'{error} It need not be cut as long as it fits, but weight="samples" needs its number of rows: '
                    "pass as weight= what the loss is a mean over, such as weight=lambda batch: len(batch[0])."
                ) from error


def num_samples(samples: Batch) -> int:
    """The length of a list of samples; BatchError where it is none, or empty."""
    if isinstance(samples, str | bytes) or not isinstance(samples, Sequence):
        raise BatchError(
            f"with collate=, the batch must be a list of samples; got a {type(samples).__name__}. Let the loader give "
            "lists: DataLoader(..., collate_fn=list)."
        )
    if not samples:
        raise EmptyBatchError("the batch is an empty list of samples. Skip empty batches before calling backward().")
    return len(samples)


def split_samples(
    samples: Sequence[Any], micro_batch_size: int | None, collate: Collate, is_even: bool = False
) -> list[MicroBatch]:
    """Cut a list of samples and collate each part.

    All parts are collated at once: a weight may be needed of each before the first backward, and a collate function
    that draws random numbers must not run again when a part runs again.
    """
    ranges = cut_range(num_samples(samples), micro_batch_size, is_even)
    return [MicroBatch(collate(list(samples[rows.start : rows.stop])), rows) for rows in ranges]


def check_collated(micro_batches: Iterable[MicroBatch], samples: Sequence[Any]) -> None:
    """Raise BatchError where collation changed the number of samples, which then cannot be the weight."""
    for index, part in enumerate(micro_batches):
        rows = count_rows(part.data)
        is_same = rows is None or rows == len(part.rows)
        if not is_same and not holds_samples(part.data, [samples[row] for row in part.rows]):
            raise BatchError(
                f"collate made {rows} rows of the {len(part.rows)} samples of micro-batch {index}{part.where}, so it "
                'is unclear what weight="samples" should count. Pass as weight= what the loss is a mean over: '
                "gradfold.token_count(...), or a callable such as lambda batch: len(batch[0])."
            )


def split_further(
    part: MicroBatch, micro_batch_size: int, collate_rows: CollateRows | None, is_even: bool = False
) -> list[MicroBatch]:
    """Split a micro-batch into smaller ones of this size at most, or of one row; raises BatchError where it cannot.

    The rows stay as they were collated, unless only collation can cut them.
    """
    if part.groups is not None:
        assert collate_rows is not None
        return [in_groups(groups, collate_rows) for groups in fill(part.groups, micro_batch_size)]
    ranges = cut_range(len(part.rows), max(1, micro_batch_size // (part.width or 1)), is_even)
    if len(ranges) == 1:
        return [part]
    rows = [part.rows[own.start : own.stop] for own in ranges]
    if collate_rows is not None and not _is_cut_by_rows(part, collate_rows):
        return [MicroBatch(collate_rows(own), own, False, part.width) for own in rows]
    if collate_rows is None and not part.is_cut:  # it was not to be cut before
        check_counts(part.data, num_rows(part.data))
    cut = RowCut(part.data, [len(own) for own in rows])
    return list(map(MicroBatch, cut.parts, rows, repeat(cut.is_new), repeat(part.width)))


def in_groups(groups: Sequence[Rows], collate_rows: CollateRows) -> MicroBatch:
    """The micro-batch of these groups of rows."""
    rows = tuple(sorted(row for group in groups for row in group))
    return MicroBatch(collate_rows(rows), rows, True, groups=groups)


def fill(groups: Sequence[Rows], size: int | None) -> list[Sequence[Rows]]:
    """As many groups as fit, one after another; at least one.

    >>> fill([range(0, 2), range(2, 4), range(4, 6), range(6, 9)], 5)
    [[range(0, 2), range(2, 4)], [range(4, 6), range(6, 9)]]
    """
    parts: list[list[Rows]] = []
    room = 0
    for group in groups:
        if not parts or (size is not None and len(group) > room):
            parts.append([])
            room = size or 0
        parts[-1].append(group)
        room -= len(group)
    return list(parts)


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
        joined += [_shifted(part, start) for part in micro_batches]
        start += sum(len(part.rows) for part in micro_batches)
    return joined


def _shifted(part: MicroBatch, by: int) -> MicroBatch:
    groups = None if part.groups is None else [shift_rows(group, by) for group in part.groups]
    return part._replace(rows=shift_rows(part.rows, by), groups=groups)


_PATIENCE = 256  # windows


@dataclass
class FittingSize:
    """How much fits in memory at once, in rows or padded tokens, learned from out-of-memory errors.

    It shrinks with every recovery. After a long period without one, twice as much is tried again, since what took the
    memory may be gone. Each time that fails, the next period is twice as long.
    """

    rows: int | None = None  # at most this much at once; None while nothing has failed
    proven: int = 0  # the most that has gone through at once
    quiet: int = 0  # windows since the last recovery
    patience: int = 1  # the length of the present period, in times `_PATIENCE` windows
    is_trying: bool = False  # whether a size that had failed is tried again

    def limit(self, asked: int | None) -> int | None:
        """The size to run where `asked` is the user's."""
        if self.rows is None:
            return asked
        return self.rows if asked is None else min(self.rows, asked)

    def shrink(self, rows: int) -> None:
        """More than `rows` did not fit."""
        if self.is_trying:
            self.patience *= 2
        self.rows = rows if self.rows is None else min(self.rows, rows)
        self.quiet, self.is_trying = 0, False

    def record_success(self, largest: int, asked: int | None) -> None:
        """A window without a fault went through, with a largest micro-batch of this size."""
        self.proven = max(self.proven, largest)
        if self.rows is None:
            return
        if self.is_trying and largest > self.rows // 2:
            self.is_trying = False  # it fits now
        self.quiet += 1
        if self.quiet >= self.patience * _PATIENCE:
            self.rows = 2 * self.rows if asked is None else min(2 * self.rows, asked)
            self.quiet, self.is_trying = 0, True


class MicroBatcher:
    """Splits batch after batch: by rows, or with `collate` lists of samples, whose parts are collated by themselves.

    Args:
        size: rows (or padded tokens) to run at once; None: the whole batch.
        counts_samples: whether samples are what is weighed, so collation must not change their number.
        is_even: whether the sizes of micro-batches differ by one row at most; else the last one has what is left.
    """

    unit = "rows"
    saved: ClassVar[Mapping[str, Any]] = {  # what a saved state must hold, for `state.saved`
        "unit": "text",
        "size": (None, "size"),
        "fitting_size": {
            **{"rows": (None, "size"), "proven": "count"},
            **{"quiet": "count", "patience": "size", "is_trying": "flag"},
        },
    }

    def __init__(
        self, size: int | None, collate: Collate | None = None, counts_samples: bool = False, is_even: bool = False
    ) -> None:
        self.size = size
        self.is_even = is_even
        self.fitting = FittingSize()
        self._collate = collate
        self._counts_samples = counts_samples
        self._samples: Sequence[Any] = ()  # the last batch, where it is a list of samples

    def split(self, batch: Batch, may_be_empty: bool = False) -> list[MicroBatch]:
        """The micro-batches of a batch, or of a window of micro-batches.

        Where there are no rows, EmptyBatchError, or with `may_be_empty` (other ranks may have some) no micro-batches.
        """
        limit = self.fitting.limit(self.size)
        try:
            if not isinstance(batch, MicroBatchWindow):
                micro_batches = self._split(batch, limit)
            elif pieces := batch.pieces():
                micro_batches = self._split_pieces(pieces, limit)
            else:
                raise EmptyBatchError("the window holds no micro-batches. Skip empty windows.")
        except EmptyBatchError:
            if not may_be_empty:
                raise
            return []
        if self._collate is not None and self._counts_samples:
            check_collated(micro_batches, self._samples)
        return micro_batches

    def _split(self, batch: Batch, limit: int | None) -> list[MicroBatch]:
        """Split one batch into micro-batches of this size at most."""
        if self._collate is None:
            return _split_pair(batch, limit, self.is_even) or self._split_nesting(batch, limit)
        self._samples = batch
        return split_samples(batch, limit, self._collate, self.is_even)

    def _split_nesting(self, batch: Batch, limit: int | None) -> list[MicroBatch]:
        micro_batches = split_rows(batch, limit, self.is_even)
        if self._counts_samples:
            check_counted(micro_batches)
        return micro_batches

    def _split_pieces(self, pieces: Sequence[Batch], limit: int | None) -> list[MicroBatch]:
        micro_batches = join_batches([self._split(piece, limit) for piece in pieces])
        if self._collate is not None:
            self._samples = [sample for piece in pieces for sample in piece]
        return micro_batches

    @property
    def collate_rows(self) -> CollateRows | None:
        """What collates rows of the last batch, a list of samples; None where rows need no collation."""
        collate, samples = self._collate, self._samples
        return None if collate is None else lambda rows: collate([samples[row] for row in rows])

    def largest(self, micro_batches: Sequence[MicroBatch]) -> int:
        """The size of the largest of some micro-batches."""
        return max(map(len, map(ROWS, micro_batches)), default=0)

    def learn(self, micro_batches: Sequence[MicroBatch]) -> None:
        """A window of these micro-batches has gone through without a fault."""
        self.fitting.record_success(self.largest(micro_batches), self.size)

    def shrink(self, sizes: Iterable[int]) -> None:
        """More rows than each of these did not fit, in a window that is done after all."""
        for size in sizes:
            self.fitting.shrink(size)

    def resize(self, num_rows: int, batch: Batch, rows_of_batch: int) -> None:
        """Run this many rows at once, as found for a batch like this one."""
        self.size = num_rows

    def state_dict(self) -> dict[str, Any]:
        """What was learned, without which a resumed run would split its batches otherwise."""
        return {"unit": self.unit, "size": self.size, "fitting_size": asdict(self.fitting)}

    def load_state_dict(self, state: Mapping[str, Any], with_size: bool) -> bool:
        """Restore what `state_dict` gave, with or without its size; False, and nothing, where it has another unit."""
        if state["unit"] != self.unit:
            return False
        self.fitting = FittingSize(**{name: state["fitting_size"][name] for name in vars(self.fitting)})
        if with_size:
            self.size = state["size"]
        return True
