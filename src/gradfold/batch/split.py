"""Splitting: how the global batches of an accumulator become micro-batches.

A `MicroBatcher` splits batch after batch and learns how much fits in memory. Each kind of split is one class: by rows
(`RowBatcher`), by samples that are collated per micro-batch (`SampleBatcher`), by padded tokens
(`packing.token_batcher`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise, repeat
from operator import attrgetter
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from gradfold.batch.loaded_window import MicroBatchWindow
from gradfold.batch.nesting import Batch, cut_rows, every_leaf, rows_if_any, structure
from gradfold.batch.rows import Rows, name_rows, num_rows, shift_rows
from gradfold.errors import BatchError, OptionError

Collate = Callable[[list[Any]], Batch]

CollateRows = Callable[[Rows], Batch]
"""Collates these rows of the global batch, which is a list of samples."""


class MicroBatch(NamedTuple):
    """What is run at once: some rows of the global batch (on the host), and which.

    Attributes:
        data: what `loss_fn` takes.
        rows: their positions in the batch, in the order of `data`; empty where they are not counted.
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


ROWS = attrgetter("rows")
_FORM = attrgetter("dtype", "ndim")


def versions(part: MicroBatch) -> list[int]:
    """The version counters of the tensors with rows, which tell whether something was written to them."""
    leaves = [leaf for leaf in every_leaf(part.data) if isinstance(leaf, Tensor) and leaf.dim()]
    return [0 if leaf.is_inference() else leaf._version for leaf in leaves]


def check_size(micro_batch_size: int | None) -> None:
    """Raise OptionError unless the size is None or a whole number of at least 1."""
    if micro_batch_size is None:
        return
    if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int):
        raise OptionError(
            f"micro_batch_size={micro_batch_size!r} is a {type(micro_batch_size).__name__}; expected the number of "
            "rows to run at once (an int of at least 1), or None for the whole batch at once."
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


def form_of(batch: Batch) -> Hashable:
    """What tells batches of one loader from others, whatever their sizes."""
    if type(batch) is tuple and set(map(type, batch)) == {Tensor}:  # the usual case, faster
        return tuple(map(_FORM, batch))
    return structure(batch)


def _split_pair(batch: Batch, micro_batch_size: int | None) -> list[MicroBatch] | None:
    """Split a tuple of one or two plain tensors, which is the usual case, without a walk; None for any other batch."""
    if type(batch) is not tuple or not 0 < len(batch) <= 2:
        return None
    for leaf in batch:
        if type(leaf) is not Tensor or leaf.dim() == 0 or leaf.layout is not torch.strided or leaf.is_nested:
            return None
    total = batch[0].shape[0]
    if total == 0 or batch[-1].shape[0] != total:
        return None
    ranges = cut_range(total, micro_batch_size)
    if len(ranges) == 1:
        return [MicroBatch(batch, ranges[0])]
    columns = map(torch.unsafe_split_with_sizes, batch, repeat(list(map(len, ranges))))  # as in `cut_rows`
    return list(map(MicroBatch, zip(*columns, strict=True), ranges, repeat(True)))


def split_rows(batch: Batch, micro_batch_size: int | None) -> list[MicroBatch]:
    """Split a nesting of tensors; micro-batches are views of it."""
    ranges = cut_range(num_rows(batch), micro_batch_size)
    if len(ranges) == 1:
        return [MicroBatch(batch, ranges[0])]
    return list(map(MicroBatch, cut_rows(batch, [len(rows) for rows in ranges]), ranges, repeat(True)))


def split_samples(samples: Sequence[Any], micro_batch_size: int | None, collate: Collate) -> list[MicroBatch]:
    """Cut a list of samples and collate each part.

    All parts are collated at once: a weight may be needed of each before the first backward, and a collate function
    that draws random numbers must not run again when a part runs again.
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
                'is unclear what weight="samples" should count. Pass as weight= what the loss is a mean over: '
                "gradfold.token_count(...), or a callable such as lambda batch: len(batch[0])."
            )


def split_further(part: MicroBatch, micro_batch_size: int, collate_rows: CollateRows | None) -> list[MicroBatch]:
    """Split a micro-batch into smaller ones of this size at most, or of one row.

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


_PATIENCE = 256  # windows


class FittingSize:
    """How much fits in memory at once, in rows or padded tokens, learned from out-of-memory errors.

    It shrinks with every recovery. After a long period without one, twice as much is tried again, since what took the
    memory may be gone. Each time that fails, the next period is twice as long.

    Attributes:
        rows: at most this much at once (padded tokens under a `TokenBudget`); None while nothing has failed.
        proven: the most that has gone through at once.
    """

    def __init__(self) -> None:
        self.rows: int | None = None
        self.proven = 0
        self._quiet = 0
        self._patience = _PATIENCE
        self._is_trying = False

    def limit(self, asked: int | None) -> int | None:
        """The size to run where `asked` is the user's."""
        if self.rows is None:
            return asked
        return self.rows if asked is None else min(self.rows, asked)

    def shrink(self, rows: int) -> None:
        """More than `rows` did not fit."""
        if self._is_trying:
            self._patience *= 2
        self.rows = rows if self.rows is None else min(self.rows, rows)
        self._quiet, self._is_trying = 0, False

    def record_success(self, largest: int, asked: int | None) -> None:
        """A window without a fault went through, with a largest micro-batch of this size."""
        self.proven = max(self.proven, largest)
        if self.rows is None:
            return
        if self._is_trying and largest > self.rows // 2:
            self._is_trying = False  # it fits now
        self._quiet += 1
        if self._quiet >= self._patience:
            self.rows, self._quiet, self._is_trying = 2 * self.rows, 0, True
            if asked is not None and self.rows >= asked:
                self.rows = asked

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to split its batches as this one would have."""
        return {name.lstrip("_"): value for name, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.rows = state["rows"]
        self.proven = state["proven"]
        self._quiet = state["quiet"]
        self._patience = state["patience"]
        self._is_trying = state["is_trying"]


class MicroBatcher(ABC):
    """Splits batch after batch.

    Attributes:
        size: rows (or padded tokens) to run at once; None: the whole batch.
        fitting: what was learned of the size that fits in memory.
    """

    unit: str = "rows"

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.fitting = FittingSize()

    def split(self, batch: Batch) -> list[MicroBatch]:
        """The micro-batches of a batch, or of a window of micro-batches.

        Raises:
            BatchError: the batch cannot be split by rows.
            WindowError: it is the window of a loop body.
        """
        if not isinstance(batch, MicroBatchWindow):
            return self._split(batch, self.fitting.limit(self.size))
        pieces = batch.pieces()
        if not pieces:
            raise BatchError("the window holds no micro-batches. Skip empty windows.")
        return self._split_pieces(pieces, self.fitting.limit(self.size))

    @abstractmethod
    def _split(self, batch: Batch, limit: int | None) -> list[MicroBatch]:
        """Split one batch into micro-batches of this size at most."""

    def _split_pieces(self, pieces: Sequence[Batch], limit: int | None) -> list[MicroBatch]:
        return join_batches([self._split(piece, limit) for piece in pieces])

    @property
    def collate_rows(self) -> CollateRows | None:
        """What collates rows of the last batch, a list of samples; None where rows need no collation."""
        return None

    def retry_smaller(self, part: MicroBatch, size: int) -> list[MicroBatch]:
        """Split a micro-batch of the last batch that did not fit; the rows stay in order.

        Raises:
            BatchError: it cannot be split.
        """
        return split_further(part, size, self.collate_rows)

    def largest(self, micro_batches: Sequence[MicroBatch]) -> int:
        """The size of the largest of some micro-batches."""
        return max(map(len, map(ROWS, micro_batches)), default=0)

    def is_proven(self, micro_batches: Sequence[MicroBatch]) -> bool:
        """Whether micro-batches of this size have gone through before."""
        return self.largest(micro_batches) <= self.fitting.proven

    def timed(self, strategy: Any) -> Any:
        """The `run` of a strategy, timed where this window is to show what a micro-step costs."""
        return strategy.run

    def check_padding(self, window: Any, probe_loss: Any, can_check: bool) -> bool:
        """Check that padding does not matter, where micro-batches have less of it than the batch; whether it is known.

        Args:
            window: the window that begins.
            probe_loss: what the check runs.
            can_check: whether rows can run by themselves.
        """
        return True

    def trust_padding(self) -> None:
        """Padding does not matter, as is known from elsewhere."""

    def learn(self, micro_batches: Sequence[MicroBatch]) -> None:
        """A window of these micro-batches has gone through without a fault."""
        self.fitting.record_success(self.largest(micro_batches), self.size)

    def shrink(self, sizes: Sequence[int]) -> None:
        """Micro-batches were halved to these sizes on out-of-memory."""
        for size in sizes:
            self.fitting.shrink(size)

    def resize(self, num_rows: int, batch: Batch, rows_of_batch: int) -> None:
        """Run this many rows at once, as found for a batch like this one."""
        self.size = num_rows

    def state_dict(self) -> dict[str, Any]:
        """What was learned."""
        return {"unit": self.unit, "size": self.size, "fitting_size": self.fitting.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], with_size: bool) -> bool:
        """Restore what `state_dict` gave, but for sizes in another unit: in rows, say, where padded tokens count.

        Args:
            state: as `state_dict` gave it.
            with_size: whether the size was found, and not given by the user.

        Returns:
            Whether it was in this unit.
        """
        if state["unit"] != self.unit:
            return False
        self.fitting.load_state_dict(state["fitting_size"])
        if with_size:
            self.size = state["size"]
        return True


@final
class RowBatcher(MicroBatcher):
    """Splits nestings of tensors by rows."""

    def _split(self, batch: Batch, limit: int | None) -> list[MicroBatch]:
        return _split_pair(batch, limit) or split_rows(batch, limit)


@final
class SampleBatcher(MicroBatcher):
    """Splits lists of samples, each part of which is collated by itself.

    Args:
        size: as for `MicroBatcher`.
        collate: the user's function.
        counts_samples: whether samples are what is weighed, so collation must not change their number.
    """

    def __init__(self, size: int | None, collate: Collate, counts_samples: bool) -> None:
        super().__init__(size)
        self._collate = collate
        self._counts_samples = counts_samples
        self._samples: Sequence[Any] = ()

    def _split(self, batch: Batch, limit: int | None) -> list[MicroBatch]:
        micro_batches = split_samples(batch, limit, self._collate)
        if self._counts_samples:
            check_collated(micro_batches)
        self._samples = batch
        return micro_batches

    def _split_pieces(self, pieces: Sequence[Batch], limit: int | None) -> list[MicroBatch]:
        micro_batches = super()._split_pieces(pieces, limit)
        self._samples = [sample for piece in pieces for sample in piece]
        return micro_batches

    @property
    def collate_rows(self) -> CollateRows:
        """What collates rows of the last batch."""
        return self._collate_rows

    def _collate_rows(self, rows: Rows) -> Batch:
        return self._collate([self._samples[row] for row in rows])
