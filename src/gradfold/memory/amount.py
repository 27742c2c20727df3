"""A margin: memory that is held back for what a prediction cannot know.

An amount of memory as people write it: "16GiB", "512 MB", or a number of bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from gradfold.errors import OptionError

__all__: list[str] = []

_UNITS = {
    **{"": 1, "b": 1},
    **{
        unit: 2**power
        for power, units in ((10, "k"), (20, "m"), (30, "g"), (40, "t"))
        for unit in (units, f"{units}ib")
    },
    **{f"{unit}b": 1000**power for power, unit in enumerate("kmgt", start=1)},
}


def read_bytes(amount: int | str) -> int:
    """The number of bytes; KiB, MiB, GiB and TiB (or K, M, G, T) are powers of 1024, KB, MB, GB and TB of 1000.

    Raises:
        OptionError: this is no amount.

    >>> read_bytes("16GiB") == 16 * 2**30 == read_bytes("16 G"), read_bytes("1.5 GB")
    (True, 1500000000)
    """
    if isinstance(amount, int) and not isinstance(amount, bool) and amount > 0:
        return amount
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", amount.lower()) if isinstance(amount, str) else None
    if found is None or found[2] not in _UNITS or int(float(found[1]) * _UNITS[found[2]]) < 1:
        raise OptionError(f"memory={amount!r}; expected an amount such as '16GiB', '512MiB' or a number of bytes.")
    return int(float(found[1]) * _UNITS[found[2]])


def written(num_bytes: int) -> str:
    """Bytes in the unit that fits.

    >>> written(3 * 2**29), written(5000)
    ('1.50 GiB', '5 KiB')
    """
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**10:.0f} KiB"


_SHARE = 0.1
# Python, torch and its threads (some 230 MiB), what convolutions rearrange, freed tensors that the heap keeps: see
# benchmarks/memory.
_HOST_BYTES = 640 * 2**20
_CONTEXT_BYTES = 600 * 2**20  # a CUDA context with its modules, and cuBLAS's two workspaces of 32 MiB

_UNKNOWN_ANYWHERE = "what kernels take for themselves while they run"
_UNKNOWN_ON_CUDA = (
    "kernels that save other tensors than those of a CPU (attention, dropout masks)",
    "workspaces of cuBLAS and cuDNN",
    "the context of the driver",
    "fragmentation of the caching allocator",
)


@dataclass(frozen=True)
class Margin:
    """What is added to predicted tensors before they are held against a budget.

    Args:
        share: of the predicted peak.
        constant_bytes: whatever is predicted: Python, torch and its threads, or the context of a GPU.
        unknown: what it is for.
    """

    share: float
    constant_bytes: int
    unknown: tuple[str, ...]

    def with_margin(self, num_bytes: int) -> int:
        """What to expect at most where so much is predicted."""
        return int(num_bytes * (1 + self.share)) + self.constant_bytes

    def __str__(self) -> str:
        constant = f" and {written(self.constant_bytes)}" if self.constant_bytes else ""
        return f"{100 * self.share:.0f} %{constant}"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"share": self.share, "constant_bytes": self.constant_bytes, "unknown": list(self.unknown)}


def margin_for(device: torch.device, share: float | None, *, is_process_there: bool) -> Margin:
    """The margin for a device: the share given or 10 %, and a constant where the budget is for a process not yet there.

    Raises:
        OptionError: the share is none.
    """
    if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 10):
        raise OptionError(f"margin={share!r}; expected the share to add to predictions, such as 0.1 for 10 %.")
    on_cuda = device.type == "cuda"
    constant = 0 if is_process_there else _CONTEXT_BYTES if on_cuda else _HOST_BYTES
    unknown = (_UNKNOWN_ANYWHERE, *(_UNKNOWN_ON_CUDA if on_cuda else ("what the heap keeps of freed tensors",)))
    return Margin(_SHARE if share is None else float(share), constant, unknown)
