"""The out-of-memory error: how it looks on each device, and giving memory back after it.

Sources: `torch.OutOfMemoryError` (accelerators), c10's CPU allocator (a `RuntimeError` with a text of its own), and
Python's `MemoryError`. The kernel's out-of-memory killer ends a process without an error: nothing can be caught there.
"""

from __future__ import annotations

import gc

import torch

__all__: list[str] = []

_CPU_ALLOCATOR = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, so that the same on fewer rows may work."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_ALLOCATOR)


def give_back(device: torch.device) -> None:
    """Free what nothing refers to, and return what torch's allocator holds in reserve.

    Call it outside the `except` block, whose traceback holds the tensors of the frames that failed.
    """
    gc.collect()
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).empty_cache()
