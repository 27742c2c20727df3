"""A budget: the memory that a window and its update may take, amounts of it as text ("16GiB"), and the margin."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from gradfold.errors import OptionError
from gradfold.memory.system import free_bytes
from gradfold.memory.tracker import MemoryBreakdown, storage_bytes

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {_letter: 1024**_power, f"{_letter}ib": 1024**_power, f"{_letter}b": 1000**_power}


def read_bytes(amount: int | str) -> int:
    """The number of bytes (K and KiB: 1024, KB: 1000, up to T); OptionError where it is not an amount.

    >>> read_bytes("16GiB") == 16 * 2**30 == read_bytes("16 G"), read_bytes("1.5 GB")
    (True, 1500000000)
    """
    is_amount = isinstance(amount, (int, str)) and not isinstance(amount, bool)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(amount).lower()) if is_amount else None
    num_bytes = 0 if found is None else int(float(found[1]) * _UNITS.get(found[2], 0))
    if num_bytes < 1:
        raise OptionError(f"memory={amount!r}; expected an amount such as '16GiB', '512MiB' or a number of bytes.")
    return num_bytes


def written(num_bytes: int) -> str:
    """Bytes in the unit that fits.

    >>> written(3 * 2**29), written(5000)
    ('1.50 GiB', '5 KiB')
    """
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


_SHARE = 0.1
# Python, torch and its threads (some 230 MiB), what convolutions rearrange, freed tensors that the heap keeps: see
# benchmarks/memory.
_HOST_BYTES = 640 * 2**20
_CONTEXT_BYTES = 600 * 2**20  # a CUDA context with its modules, and cuBLAS's two workspaces of 32 MiB
_UNKNOWN = {
    "cuda": (
        "what kernels take for themselves while they run",
        "kernels that save other tensors than those of a CPU (attention, dropout masks)",
        "workspaces of cuBLAS and cuDNN",
        "the context of the driver",
        "fragmentation of the caching allocator",
    ),
    "cpu": ("what kernels take for themselves while they run", "what the heap keeps of freed tensors"),
}


@dataclass(frozen=True)
class Margin:
    """What is added to a predicted peak before it is compared with a budget."""

    share: float  # of the peak
    constant_bytes: int  # for Python, torch and its threads, or the context of a GPU
    unknown: tuple[str, ...]  # what the share is for

    def with_margin(self, num_bytes: int) -> int:
        """The most to expect where `num_bytes` are predicted."""
        return int(num_bytes * (1 + self.share)) + self.constant_bytes

    def __str__(self) -> str:
        constant = f" and {written(self.constant_bytes)}" if self.constant_bytes else ""
        return f"{100 * self.share:.0f} %{constant}"


def margin_for(device: torch.device, share: float | None, *, is_process_there: bool) -> Margin:
    """The margin for a device: the share given or 10 %, and a constant unless the process is there and measured."""
    if share is not None and (isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 10):
        raise OptionError(f"margin={share!r}; expected the share to add to predictions, such as 0.1 for 10 %.")
    constant = 0 if is_process_there else _CONTEXT_BYTES if device.type == "cuda" else _HOST_BYTES
    return Margin(_SHARE if share is None else float(share), constant, _UNKNOWN.get(device.type, _UNKNOWN["cpu"]))


@dataclass(frozen=True)
class Budget:
    """A bound for predicted peaks: by default, of all that a process or device may use."""

    num_bytes: int | None  # None: not known
    margin: Margin
    is_on_top: bool = False  # whether `num_bytes` comes on top of what parameters and inputs have taken already
    state_bytes: int = 0  # what an optimizer is going to keep that predictions leave out

    def needed_bytes(self, peak: MemoryBreakdown) -> int:
        """What is needed for a predicted peak, with the margin."""
        in_use = peak.parameters + peak.inputs if self.is_on_top else 0
        return self.margin.with_margin(peak.total - in_use + self.state_bytes)

    def has_room_for(self, peak: MemoryBreakdown) -> bool:
        """Whether a predicted peak fits, with the margin."""
        return self.num_bytes is None or self.needed_bytes(peak) <= self.num_bytes


def tuning_budget(memory: int | str | None, margin: float | None, model: nn.Module) -> Budget:
    """What an accumulator may take that picks its own size: as much as is given, or what is free by now."""
    device, is_free = next(model.parameters()).device, memory is None
    # Optimizers make their state in the first update; Adam's is two tensors per parameter.
    state_bytes = 2 * storage_bytes(one for one in model.parameters() if one.requires_grad)
    num_bytes = free_bytes(device) if memory is None else read_bytes(memory)
    return Budget(num_bytes, margin_for(device, margin, is_process_there=is_free), is_free, state_bytes)
