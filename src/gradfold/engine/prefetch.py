"""Prefetching: the micro-batches of a window are copied to the device, one ahead of the one that is asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, every_leaf, in_own_containers, is_container, rebuilt
from gradfold.batch.own_rows import moved_by_itself
from gradfold.batch.split import MicroBatch


def prefetch(micro_batches: Sequence[MicroBatch], device: torch.device) -> Callable[[int], Batch]:
    """A function from the index of a micro-batch to its data on `device`; each may be asked for again."""
    if device.type == "cpu":
        return [part.data for part in micro_batches].__getitem__
    return Prefetcher(micro_batches, device).take


class Prefetcher:
    """Hands out micro-batches on a device, while the host keeps its own.

    At most two micro-batches are on the device: the one in use and the next. Copies to CUDA run on a separate stream,
    and overlap the computation when the batch is in pinned memory (`DataLoader(pin_memory=True)`). The CUDA
    path has not been run on a GPU yet.
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], device: torch.device) -> None:
        self._micro_batches = micro_batches
        self._device = device
        self._ahead: tuple[int, Batch] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def take(self, index: int) -> Batch:
        """Micro-batch `index` on the device; starts to move the next one."""
        batch = self._ahead[1] if self._ahead is not None and self._ahead[0] == index else self._move(index)
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for leaf in every_leaf(batch):
                if isinstance(leaf, Tensor) and leaf.is_cuda:
                    # Else the allocator may hand the memory to the next copy while kernels still read it.
                    leaf.record_stream(current)
        following = index + 1
        self._ahead = (following, self._move(following)) if following < len(self._micro_batches) else None
        return batch

    def _move(self, index: int) -> Batch:
        return self._to_device(self._micro_batches[index].data)

    def _to_device(self, node: Any) -> Any:
        """A part of a batch on the device, by its own `to` where it has one.

        That runs on the current stream, since the tensors of an object may not be found.
        """
        if isinstance(node, Tensor):
            return self._copy(node)
        if hasattr(node, "to") and not isinstance(node, type):
            return moved_by_itself(node, self._device, _own)
        return rebuilt(self._to_device, node) if is_container(node) else node

    def _copy(self, leaf: Tensor) -> Tensor:
        if self._stream is None or not leaf.is_cpu:
            return leaf.to(self._device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            return leaf.to(self._device, non_blocking=True)


def _own(node: Any) -> Any:
    """Another object with the same tensors, which may be written to."""
    own = in_own_containers(node)
    return copy.copy(node) if own is node else own
