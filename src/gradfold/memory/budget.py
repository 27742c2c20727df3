"""A budget: the memory that a window may take where its size sets itself."""

from __future__ import annotations

from gradfold.memory.amount import margin_for, read_bytes
from gradfold.memory.auto import Auto
from gradfold.memory.probe_batch import Work, storage_bytes
from gradfold.memory.system import free_bytes
from gradfold.memory.trace import MemoryBreakdown

__all__: list[str] = []


class Budget:
    """What a window may take: the option's, for all of the process or device; or what is free, on top of what is there.

    Attributes:
        num_bytes: None where nobody says.
    """

    def __init__(self, option: Auto, work: Work) -> None:
        self._is_for_all = option.memory is not None
        self._margin = margin_for(work.device, option.margin, is_process_there=not self._is_for_all)
        self.num_bytes = free_bytes(work.device) if option.memory is None else read_bytes(option.memory)
        # Optimizers make their state in the first update; Adam's is two tensors per parameter.
        self._state_bytes = 2 * storage_bytes(one for one in work.model.parameters() if one.requires_grad)

    def has_room_for(self, peak: MemoryBreakdown) -> bool:
        """Whether a predicted peak fits, with its margin and an optimizer that has no state yet."""
        there = 0 if self._is_for_all else peak.parameters + peak.inputs
        return (
            self.num_bytes is None or self._margin.with_margin(peak.total - there + self._state_bytes) <= self.num_bytes
        )
