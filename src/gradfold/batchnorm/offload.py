"""Offload: what forward passes save for the backward pass waits in host memory.

Transfers are queued on the stream that computes, and pinned memory lets the host go on. Small tensors stay, since a
transfer would cost more than it saves; one that several operators save is transferred once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradfold.batchnorm.torch_private import StorageWeakRef

_LEAST_BYTES = 2**14


@dataclass(frozen=True, slots=True)
class Parked:
    """A tensor on the host, and its device."""

    copy: Tensor
    device: torch.device


class Offload:
    """Hooks on saved tensors (`pack` and `unpack`), for the threads of one window; `stays` are on the device anyway."""

    def __init__(self, stays: Iterable[Tensor], least_bytes: int = _LEAST_BYTES) -> None:
        self._stays = {one.untyped_storage().data_ptr() for one in stays if one.layout is torch.strided}
        self._least_bytes = least_bytes
        self._parked: dict[Hashable, tuple[StorageWeakRef, Parked]] = {}

    def pack(self, tensor: Tensor) -> Tensor | Parked:
        """What autograd keeps instead of a tensor."""
        if tensor.layout is not torch.strided or tensor.numel() * tensor.itemsize < self._least_bytes:
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._stays:
            return tensor
        where = storage.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        key = *where, tensor.dtype, tensor._version
        known = self._parked.get(key)
        if known is not None and not known[0].expired():
            return known[1]
        for freed in [key for key, (storage_ref, _) in self._parked.items() if storage_ref.expired()]:
            del self._parked[freed]  # autograd holds those that it still needs
        parked = Parked(self.to_host(tensor), tensor.device)
        self._parked[key] = StorageWeakRef(storage), parked
        return parked

    def unpack(self, saved: Tensor | Parked) -> Tensor:
        """The tensor, on its device."""
        return saved if isinstance(saved, Tensor) else saved.copy.to(saved.device, non_blocking=True, copy=True)

    def to_host(self, tensor: Tensor) -> Tensor:
        """A copy in host memory."""
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
        return copy.copy_(tensor.detach(), non_blocking=True)
