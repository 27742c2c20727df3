"""The system's view of memory: the most that this process has used, how much there is, and how much is free."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

if sys.platform != "win32":
    import resource

_UNLIMITED = 1 << 60
# Limit and usage of a control group (containers), of version 2 and of version 1.
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Memory:
    """The memory of the device that trains, "cuda" or "cpu"."""

    device: str
    peak_bytes: int  # the most in use: by torch's allocator on CUDA, else by the whole process
    available_bytes: int  # on the device, or under the limits of the process; 0 where it is not known


def read_memory() -> Memory:
    """The memory now."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        share = torch.cuda.get_per_process_memory_fraction()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return Memory("cuda", torch.cuda.max_memory_allocated(), int(total * share))
    limits = [_physical_bytes(), *(limit for limit, _ in _control_groups())]
    limits += [_resource_limit(name) for name in ("RLIMIT_AS", "RLIMIT_DATA")]
    known = [limit for limit in limits if limit is not None and 0 < limit < _UNLIMITED]
    return Memory("cpu", high_water_mark_bytes(), min(known, default=0))


def free_bytes(device: torch.device) -> int | None:
    """The memory that this process may still take on a device; None where it is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)  # what the driver has, beside what torch's allocator holds in reserve
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    bounds = [_proc_bytes("/proc/meminfo", "MemAvailable")]
    bounds += [max(limit - usage, 0) for limit, usage in _control_groups()][:1]
    limit, used = _resource_limit("RLIMIT_AS"), _proc_bytes("/proc/self/status", "VmSize")
    if limit is not None and used is not None:
        bounds.append(max(limit - used, 0))
    return min((bound for bound in bounds if bound is not None), default=None)


def high_water_mark_bytes() -> int:
    """The most physical memory that this process has held; 0 where the system does not say.

    Linux's `ru_maxrss` survives exec, so a small child of a large parent reports the parent; `VmHWM` does not.
    """
    found = _proc_bytes("/proc/self/status", "VmHWM")
    if found is not None:
        return found
    if sys.platform == "win32":
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_high_water_mark() -> None:
    """Bring the mark down to what is in use now, where Linux allows it (proc(5), clear_refs, value 5)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _physical_bytes() -> int | None:
    with suppress(ValueError, OSError, AttributeError):  # AttributeError on Windows
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _control_groups() -> Iterator[tuple[int, int]]:
    for limit, usage in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):  # "max" is not a number: no limit
            yield int(Path(limit).read_text()), int(Path(usage).read_text())


def _resource_limit(name: str) -> int | None:
    if sys.platform == "win32":
        return None
    limit, _ = resource.getrlimit(getattr(resource, name))
    return None if limit == resource.RLIM_INFINITY else limit


def _proc_bytes(path: str, name: str) -> int | None:
    """A value in kB from a file of `name: value kB` lines."""
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
