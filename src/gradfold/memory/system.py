"""The system's view of memory: the high-water mark of this process, and what is still to be had.

Memory: the most that was in use, and the most there is.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from contextlib import suppress
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


def reset_high_water_mark() -> None:
    """Bring the mark down to what is in use now, where Linux allows it (proc(5), clear_refs, value 5)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def high_water_mark_bytes() -> int:
    """The most physical memory that this process has held; 0 where the system does not say.

    Linux's `ru_maxrss` survives exec, so that a small child of a large parent reports the parent; `VmHWM` does not.
    """
    found = _status_bytes("VmHWM")
    if found is not None:
        return found
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: torch.device) -> int | None:
    """The memory that this process may still take on a device; None where nobody says.

    On a CPU the least of: what the system calls available, what the control group leaves (containers), and the limit of
    the address space. On CUDA what the driver has, and what torch's allocator holds in reserve.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    bounds = [_available_bytes(), _group_bytes(), _address_space_bytes()]
    return min((bound for bound in bounds if bound is not None), default=None)


def _available_bytes() -> int | None:
    return _lines_bytes(Path("/proc/meminfo"), "MemAvailable")


def _group_bytes() -> int | None:
    """What a control group of version 2, or of version 1, leaves."""
    for folder, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            return max(int(Path(folder, limit).read_text()) - int(Path(folder, usage).read_text()), 0)
    return None


def _address_space_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    used = _status_bytes("VmSize")
    return None if limit == resource.RLIM_INFINITY or used is None else max(limit - used, 0)


def _status_bytes(name: str) -> int | None:
    return _lines_bytes(Path("/proc/self/status"), name)


def _lines_bytes(path: Path, name: str) -> int | None:
    """A value in kB from a file of `name: value kB` lines."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
