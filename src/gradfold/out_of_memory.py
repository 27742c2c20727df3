"""The out-of-memory error: how it looks on each device, and giving memory back after it.

Sources: `torch.OutOfMemoryError` (accelerators), c10's CPU allocator (a `RuntimeError` with a text of its own), and
Python's `MemoryError`. The kernel's out-of-memory killer ends a process without an error: nothing can be caught there.
"""

from __future__ import annotations

import ctypes
import gc
from functools import cache

import torch

__all__: list[str] = []

_CPU_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # Windows
    "std::bad_alloc",
    "could not create a primitive",  # oneDNN does not say why; convolutions end so under a limit
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, so that the same on fewer rows may work."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_TEXTS)


def give_back(device: torch.device) -> None:
    """Free what nothing refers to, and return what torch's allocator holds in reserve.

    Call it outside the `except` block, whose traceback holds the tensors of the frames that failed.
    """
    gc.collect()
    if device.type == "cpu":
        _keep_heap_small()
    elif device.type != "meta":
        torch.get_device_module(device).empty_cache()


@cache
def _keep_heap_small() -> None:
    """Have glibc take tensors of 128 KiB and more from the system one by one, and give them back at once.

    By default it learns to keep tensors of up to 32 MiB in its heap, whose holes fit only what is smaller: under a
    limit of the address space a half to a quarter of the rows go through then, and at last none. For the whole process,
    but only where memory has run out. Source: mallopt(3), M_MMAP_THRESHOLD.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # other C libraries have none, and another heap
        libc.mallopt(-3, 128 * 1024)
        libc.malloc_trim(0)
    except (OSError, TypeError, AttributeError):
        pass
