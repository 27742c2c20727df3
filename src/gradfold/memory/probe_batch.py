"""A specimen: micro-batches of any size cut from one global batch, as large in memory as they may come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import Batch, cut_rows, every_leaf
from gradfold.batch.rows import num_rows
from gradfold.batch.split import Collate
from gradfold.distributed.process_group import LocalGroup
from gradfold.engine.backward import BackPropagation
from gradfold.engine.loss_terms import LossFn
from gradfold.errors import BatchError, OptionError
from gradfold.memory.tracker import storages
from gradfold.precision import Precision

__all__: list[str] = []


class ProbeBatch:
    """One global batch, from which micro-batches are taken to be looked at.

    Where samples are collated, their lengths vary: then a micro-batch is the longest sample as many times as it takes,
    which is the worst that can come of these samples.

    Args:
        batch: what `Accumulator.backward` takes.
        collate: as for `Accumulator`.

    Attributes:
        collate: as given.
        num_rows: of the batch.

    Raises:
        BatchError: the batch cannot be cut by rows.
        OptionError: it is a window, of which one micro-batch should be given.
    """

    def __init__(self, batch: Batch, collate: Collate | None) -> None:
        self._batch = batch
        self.collate = collate
        if collate is None:
            self.num_rows = num_rows(batch)
            return
        if not isinstance(batch, Sequence) or not batch:
            raise BatchError("with collate=, the batch must be a list of samples, of at least one.")
        self.num_rows = len(batch)
        self._longest = max(batch, key=extent)

    def take(self, size: int) -> Batch:
        """A micro-batch of `size` rows, on the host."""
        if not 1 <= size <= self.num_rows:
            raise OptionError(f"a micro-batch of {size} rows; expected 1 to {self.num_rows}, which the batch has.")
        if self.collate is not None:
            return self.collate([self._longest] * size)
        return cut_rows(self._batch, [size, self.num_rows - size])[0]

    def take_as_it_is(self, size: int, start: int = 0) -> Batch:
        """Some rows, with the lengths that they have."""
        if self.collate is not None:
            return self.collate(list(self._batch[start : start + size]))
        return cut_rows(self._batch, [start, size, self.num_rows - start - size])[1]

    def host_bytes(self, size: int) -> int:
        """What a window's inputs take on the host: the batch itself and, where it is collated, all its parts."""
        if self.collate is None:
            return storage_bytes(every_leaf(self._batch))
        collated = storage_bytes(every_leaf(self.take(1))) * size
        return storage_bytes(every_leaf(self._batch)) + -(-self.num_rows // size) * collated

    def device_bytes(self, size: int, round_up: Callable[[int], int]) -> int:
        """What they take on a device, to which micro-batches are moved one ahead of the one in use."""
        leaves = [leaf for leaf in every_leaf(self.take(1)) if isinstance(leaf, Tensor)]
        return sum(round_up(leaf.nbytes * size) for leaf in leaves) * min(2, -(-self.num_rows // size))


def extent(sample: Any) -> int:
    """How much there is of a sample: elements of tensors and arrays, letters of text, and one for each other value."""
    total = 0
    for leaf in every_leaf(sample):
        if isinstance(leaf, Tensor):
            total += leaf.numel()
        elif hasattr(leaf, "size") and isinstance(leaf.size, int):
            total += leaf.size
        else:
            total += len(leaf) if isinstance(leaf, Sized) else 1
    return total


def storage_bytes(leaves: Iterable[Any]) -> int:
    """The memory under tensors, each piece once."""
    found: dict[int, torch.UntypedStorage] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found.update((storage._cdata, storage) for storage in storages(leaf))
    return sum(storage.nbytes() for storage in found.values())


@dataclass(frozen=True)
class Work:
    """What is to be sized.

    Args:
        model: that is trained.
        loss_fn: as for `Accumulator`.
        precision: as for `Accumulator`, read.
        back_propagate: the backward pass of the engine.
        specimen: of a global batch.
        device: of the model.
        company: in which sizes are tried.
        reduces_once: whether ranks sum the gradients of shards once per window.
    """

    model: nn.Module
    loss_fn: LossFn
    precision: Precision
    back_propagate: BackPropagation
    specimen: ProbeBatch
    device: torch.device
    company: LocalGroup = field(default_factory=LocalGroup)
    reduces_once: bool = False
