"""Memory: the most that was in use, and the most there is."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

__all__: list[str] = []

_UNLIMITED = 1 << 60
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Memory:
    """Of the device that trains.

    Attributes:
        device: "cuda" or "cpu".
        peak_bytes: the most in use: by torch's allocator on CUDA, else by the whole process.
        available_bytes: what there is: on the device, or under the limits of the process; 0 where it is not known.
    """

    device: str
    peak_bytes: int
    available_bytes: int


def read_memory() -> Memory:
    """As it is now.

    Example:
        >>> memory = read_memory()
        >>> 0 < memory.peak_bytes
        True
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        share = torch.cuda.get_per_process_memory_fraction()
        return Memory(
            "cuda",
            torch.cuda.max_memory_allocated(),
            int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory * share),
        )
    return Memory("cpu", _peak(), _available())


def _peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _available() -> int:
    known = []
    with contextlib.suppress(ValueError, OSError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _LIMITS:
        try:
            known.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue
    for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            known.append(soft)
    usable = [one for one in known if 0 < one < _UNLIMITED]
    return min(usable, default=0)
