"""An offload: keeps what forward passes save for the backward pass in host memory, and brings it back when it is used.

On the device stay the parameters and buffers, which are there anyway, and small tensors, whose transfer would take
longer than they are worth. A tensor that several operators save is transferred to the host once. The host's copies of
CUDA tensors are in pinned memory, and transfers are queued on the stream that computes, so that the host never waits.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

__all__: list[str] = []

_LEAST_BYTES = 2**14

_Key: TypeAlias = "tuple[int, Hashable, tuple[int, ...], tuple[int, ...], torch.dtype, int]"


@dataclass(frozen=True, slots=True)
class Parked:
    """A tensor on the host, and where it belongs."""

    copy: Tensor
    device: torch.device


class Offload:
    """Hooks on saved tensors, for the threads of one window.

    Args:
        stays: tensors that are on the device anyway.
        least_bytes: what is smaller stays as well.
    """

    def __init__(self, stays: Iterable[Tensor], least_bytes: int = _LEAST_BYTES) -> None:
        self._stays = {one.untyped_storage().data_ptr() for one in stays if one.layout is torch.strided}
        self._least_bytes = least_bytes
        self._parked: dict[_Key, tuple[StorageWeakRef, Parked]] = {}

    def hooks(self) -> AbstractContextManager[Any]:
        """To be on while a micro-batch runs."""
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Tensor | Parked:
        """What autograd keeps in the place of a tensor."""
        if tensor.layout is not torch.strided or tensor.numel() * tensor.itemsize < self._least_bytes:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._stays:
            return tensor
        key = (
            storage.data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor._version,
        )
        known = self._parked.get(key)
        if known is not None and not known[0].expired():  # type: ignore[no-untyped-call]
            return known[1]
        self._forget_freed()
        parked = Parked(self.to_host(tensor), tensor.device)
        self._parked[key] = StorageWeakRef(storage), parked  # type: ignore[no-untyped-call]
        return parked

    def unpack(self, saved: Tensor | Parked) -> Tensor:
        """The tensor, on its device."""
        return saved if isinstance(saved, Tensor) else self.to_device(saved)

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory."""
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
        return copy.copy_(tensor.detach(), non_blocking=True)

    def to_device(self, parked: Parked) -> Tensor:
        """A copy on the device that it came from."""
        return parked.copy.to(parked.device, non_blocking=True, copy=True)

    def _forget_freed(self) -> None:
        """Let go of copies whose tensors are gone: autograd holds those that are still wanted."""
        freed = [key for key, (ref, _) in self._parked.items() if ref.expired()]  # type: ignore[no-untyped-call]
        for key in freed:
            del self._parked[key]
