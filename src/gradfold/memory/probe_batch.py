"""A probe batch: micro-batches of any size taken from one global batch, as large in memory as they can get."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

from torch import Tensor

from gradfold.batch.nesting import Batch, cut_rows, every_leaf
from gradfold.batch.rows import num_rows
from gradfold.batch.split import Collate
from gradfold.errors import BatchError, OptionError
from gradfold.memory.tracker import storage_bytes


class ProbeBatch:
    """One global batch (not a window), from which micro-batches are taken to probe their memory and speed.

    Samples to collate vary in length: there a micro-batch is the longest sample repeated, which is the worst case.

    Raises:
        BatchError: the batch cannot be split by rows.
    """

    def __init__(self, batch: Batch, collate: Collate | None) -> None:
        self._batch = batch
        self.collate = collate
        if collate is None:
            self.num_rows = num_rows(batch)
            return
        if not isinstance(batch, Sequence) or not batch:
            raise BatchError("with collate=, the batch must be a list of at least one sample.")
        self.num_rows = len(batch)
        self._longest = max(batch, key=extent)

    def take(self, size: int) -> Batch:
        """A micro-batch of `size` rows, on the host."""
        if not 1 <= size <= self.num_rows:
            raise OptionError(f"a micro-batch of {size} rows; expected 1 to {self.num_rows}, the rows of the batch.")
        if self.collate is not None:
            return self.collate([self._longest] * size)
        return cut_rows(self._batch, [size, self.num_rows - size])[0]

    def take_unchanged(self, size: int, start: int) -> Batch:
        """The rows from `start`, with the lengths that they have."""
        if self.collate is not None:
            return self.collate(list(self._batch[start : start + size]))
        return cut_rows(self._batch, [start, size, self.num_rows - start - size])[1]

    def host_bytes(self, size: int) -> int:
        """What a window's inputs take on the host: the batch and, where it is collated, all micro-batches."""
        if self.collate is None:
            return storage_bytes(every_leaf(self._batch))
        collated = storage_bytes(every_leaf(self.take(1))) * size
        return storage_bytes(every_leaf(self._batch)) + -(-self.num_rows // size) * collated

    def device_bytes(self, size: int, block: int) -> int:
        """What they take on a device: the micro-batch in use, and the next one, which is moved ahead."""
        leaves = [leaf for leaf in every_leaf(self.take(1)) if isinstance(leaf, Tensor)]
        return sum(-(-leaf.nbytes * size // block) * block for leaf in leaves) * min(2, -(-self.num_rows // size))


def extent(sample: Any) -> int:
    """How much there is of a sample: elements of tensors and arrays, letters of text, and one for each other value."""
    return sum(map(_extent_of, every_leaf(sample)))


def _extent_of(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return leaf.numel()
    if isinstance(getattr(leaf, "size", None), int):
        return int(leaf.size)
    return len(leaf) if isinstance(leaf, Sized) else 1
