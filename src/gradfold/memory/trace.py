"""A ledger: every piece of tensor memory that was taken and given back, in order, and what it was for.

Entries come in the order of the program, so that two runs of one program on different numbers of rows have ledgers that
agree entry by entry, and differ in bytes alone.

Kernels that hold more than fake tensors show: known differences between an operator's fake and its CPU kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__: list[str] = []

_aten = torch.ops.aten

# These losses work out one value per element in their result, and shrink it to a number without giving memory back.
_REDUCED_IN_PLACE = (
    _aten.mse_loss.default,
    _aten.smooth_l1_loss.default,
    _aten.binary_cross_entropy.default,
    _aten.soft_margin_loss.default,
)


def held_bytes(function: Callable[..., Any], args: tuple[Any, ...], made: Any) -> int | None:
    """The memory under what an operator made, where its fake on a CPU shows less; else None."""
    if function not in _REDUCED_IN_PLACE or not isinstance(made, FakeTensor) or made.device.type != "cpu":
        return None
    elements = torch.Size(max(sizes) for sizes in zip(*(arg.shape for arg in args[:2]), strict=True))
    return int(elements.numel() * made.element_size())


Kind: TypeAlias = Literal[
    "parameters", "gradients", "optimizer_state", "saved_activations", "temporaries", "inputs", "ignored"
]
"""What memory is for; "ignored" counts nowhere."""


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes in use at one moment, by what they are for.

    Attributes:
        parameters: parameters, and the buffers of modules.
        gradients: what stands in `.grad`.
        optimizer_state: what optimizers keep between updates.
        saved_activations: what a forward pass left alive when its backward pass began: what that pass needs, and
            outputs that somebody holds.
        temporaries: everything else that was made on the way.
        inputs: batches, and what is computed from them without a parameter having a part in it.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    saved_activations: int = 0
    temporaries: int = 0
    inputs: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """As plain numbers."""
        return asdict(self)


KINDS: tuple[str, ...] = tuple(field.name for field in fields(MemoryBreakdown))


class AllocationTrace:
    """Takes entries, and says when most memory was in use and for what.

    Pieces of memory have numbers. What they were for may be noted later than they were made: it counts from the start.

    Attributes:
        num_bytes: of each piece.
        kinds: of each piece.
        first: pieces that were there before the first entry.
        entries: a piece's number where it was taken, its complement where it was given back.
        phases: where each stretch of entries begins, and its name.
        held_metrics: bytes that stay in use for the metrics of one micro-batch until the window ends.
        row_metrics: bytes of those with an entry per row, which are joined there.
    """

    def __init__(self) -> None:
        self.num_bytes: list[int] = []
        self.kinds: list[Kind] = []
        self.first: list[int] = []
        self.entries: list[int] = []
        self.phases: list[tuple[int, str]] = []
        self.held_metrics = 0
        self.row_metrics = 0

    def begin(self, phase: str) -> None:
        """What comes now belongs to this phase."""
        self.phases.append((len(self.entries), phase))

    def find(self, num_bytes: int, kind: Kind) -> int:
        """A piece that has been there from the start, though it is seen only now."""
        number = self._add(num_bytes, kind)
        self.first.append(number)
        return number

    def take(self, num_bytes: int, kind: Kind) -> int:
        """A new piece."""
        number = self._add(num_bytes, kind)
        self.entries.append(number)
        return number

    def give_back(self, number: int) -> None:
        """A piece is free again."""
        self.entries.append(~number)

    def agrees_with(self, other: AllocationTrace) -> bool:
        """Whether both are of one program: the same entries, but for their bytes."""
        return (self.entries, self.phases, self.first, self.kinds) == (
            other.entries,
            other.phases,
            other.first,
            other.kinds,
        )

    def peaks(self, num_bytes: Sequence[int] | None = None) -> dict[str, MemoryBreakdown]:
        """The make-up when most was in use, by phase, in the order of phases; `num_bytes` stands in for those noted."""
        num_bytes = self.num_bytes if num_bytes is None else num_bytes
        now = dict.fromkeys((*KINDS, "ignored"), 0)
        for number in self.first:
            now[self.kinds[number]] += num_bytes[number]
        peaks: dict[str, tuple[int, dict[str, int]]] = {}
        stops = [*[start for start, _ in self.phases[1:]], len(self.entries)]
        for (start, phase), stop in zip(self.phases, stops, strict=True):
            # What stands at the beginning of a stretch belongs to the one before, unless the phase is new.
            highest = peaks.get(phase, (sum(now.values()) - now["ignored"], dict(now)))
            peaks[phase] = self._run(now, self.entries[start:stop], num_bytes, highest)
        return {phase: MemoryBreakdown(**{kind: found[kind] for kind in KINDS}) for phase, (_, found) in peaks.items()}

    def _run(
        self, now: dict[str, int], entries: Sequence[int], num_bytes: Sequence[int], highest: tuple[int, dict[str, int]]
    ) -> tuple[int, dict[str, int]]:
        """Follow entries from `now`, which moves along; the highest total so far, with the make-up there."""
        total = sum(now.values()) - now["ignored"]
        for entry in entries:
            number, sign = (entry, 1) if entry >= 0 else (~entry, -1)
            kind = self.kinds[number]
            now[kind] += sign * num_bytes[number]
            if kind != "ignored":
                total += sign * num_bytes[number]
            if entry >= 0 and total > highest[0]:
                highest = total, dict(now)
        return highest

    def _add(self, num_bytes: int, kind: Kind) -> int:
        self.num_bytes.append(num_bytes)
        self.kinds.append(kind)
        return len(self.num_bytes) - 1
