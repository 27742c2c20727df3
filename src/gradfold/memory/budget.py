"""A budget: the memory that a window and its update may take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from gradfold.memory.amount import Margin, margin_for, read_bytes
from gradfold.memory.system import free_bytes
from gradfold.memory.trace import MemoryBreakdown
from gradfold.memory.tracker import storage_bytes


@dataclass(frozen=True)
class Budget:
    """A bound for predicted peaks."""

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


def budget_for(memory: int | str, margin: float | None, device: torch.device) -> Budget:
    """So much memory, for all of a process or device; OptionError where an argument is not valid."""
    return Budget(read_bytes(memory), margin_for(device, margin, is_process_there=False))


def tuning_budget(memory: int | str | None, margin: float | None, model: nn.Module) -> Budget:
    """What an accumulator may take that picks its own size: as much as is given, or what is free by now."""
    device = next(model.parameters()).device
    # Optimizers make their state in the first update; Adam's is two tensors per parameter.
    state_bytes = 2 * storage_bytes(one for one in model.parameters() if one.requires_grad)
    if memory is not None:
        return replace(budget_for(memory, margin, device), state_bytes=state_bytes)
    return Budget(free_bytes(device), margin_for(device, margin, is_process_there=True), True, state_bytes)
