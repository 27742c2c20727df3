"""The machine and the versions that a result was measured with; nothing that names a person or a host."""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__: list[str] = []


def versions() -> dict[str, str]:
    """The versions of what computes."""
    return {"gradfold": _installed_version(), "torch": torch.__version__, "python": platform.python_version()}


def describe_machine() -> dict[str, Any]:
    """Processor, cores, platform, and the GPU where there is one."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


class OtherPrograms:
    """How much of the machine other programs use while a child runs, where Linux tells."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._busy_since, self._own_since = _busy_s(), _own_s()

    def num_cores(self) -> float | None:
        """How many cores others kept busy, on average, since the making of this; ask when the child has ended."""
        if self._busy_since is None:
            return None
        others = (_busy_s() or 0.0) - self._busy_since - (_own_s() - self._own_since)
        return max(others, 0.0) / (time.monotonic() - self._since)


def _busy_s() -> float | None:
    """Seconds of work of all cores since the machine started: proc(5), the first line of /proc/stat."""
    with suppress(OSError):
        line = Path("/proc/stat").read_text().partition("\n")[0]
        user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(int, line.split()[1:9])
        return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")
    return None


def _own_s() -> float:
    """Seconds of work of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _installed_version() -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("gradfold")
    return "not installed"


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
