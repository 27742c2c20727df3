"""An allocation trace: every storage that was allocated and freed, in order, and what it was for.

Events come in the order of the program: two runs of one program on different numbers of rows have traces that agree
event by event, and differ in bytes alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal[
    "parameters", "gradients", "optimizer_state", "saved_activations", "temporaries", "inputs", "ignored"
]
"""What memory is for; "ignored" counts nowhere."""


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes in use at one moment, by what they are for."""

    parameters: int = 0  # those of modules, and their buffers
    gradients: int = 0
    optimizer_state: int = 0  # what optimizers keep between updates
    saved_activations: int = 0  # what a forward pass left alive when its backward pass began
    temporaries: int = 0  # everything else
    inputs: int = 0  # batches, and what is computed from them without a parameter having a part in it

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


KINDS: tuple[str, ...] = tuple(field.name for field in fields(MemoryBreakdown))


def highest(breakdowns: Iterable[MemoryBreakdown]) -> MemoryBreakdown:
    """The breakdown with the largest total."""
    return max(breakdowns, key=lambda one: one.total)


class AllocationTrace:
    """Takes events, and says when most memory was in use and for what."""

    def __init__(self) -> None:
        self.num_bytes: list[int] = []  # of each storage, by its number
        self.kinds: list[Kind] = []  # of each storage; noted later than it was allocated, it counts from the start
        self.initial: list[int] = []  # storages that were there before the first event
        self.events: list[int] = []  # a storage's number where it was allocated, its complement where it was freed
        self.phases: list[tuple[int, str]] = []  # where each stretch of events begins, and its name
        self.held_metrics = 0  # bytes that stay in use for the metrics of one micro-batch until the window ends
        self.row_metrics = 0  # of those with an entry per row, which are concatenated there

    def begin(self, phase: str) -> None:
        """The events from here on belong to this phase."""
        self.phases.append((len(self.events), phase))

    def find(self, num_bytes: int, kind: Kind) -> int:
        """A storage that has been there from the start, though it is seen only now."""
        self.initial.append(self._add(num_bytes, kind))
        return self.initial[-1]

    def allocate(self, num_bytes: int, kind: Kind) -> int:
        """A new storage."""
        self.events.append(self._add(num_bytes, kind))
        return self.events[-1]

    def free(self, number: int) -> None:
        """A storage is gone."""
        self.events.append(~number)

    def agrees_with(self, other: AllocationTrace) -> bool:
        """Whether both are of one program: the same events, but for their bytes."""
        ours, theirs = ((one.events, one.phases, one.initial, one.kinds) for one in (self, other))
        return ours == theirs

    def peaks(self, num_bytes: Sequence[int] | None = None) -> dict[str, MemoryBreakdown]:
        """The breakdown when most was in use, by phase, in order; `num_bytes` stands in for those noted."""
        sizes = zip(self.num_bytes if num_bytes is None else num_bytes, self.kinds, strict=True)
        counted = [0 if kind == "ignored" else size for size, kind in sizes]
        now = dict.fromkeys((*KINDS, "ignored"), 0)
        for number in self.initial:
            now[self.kinds[number]] += counted[number]
        total = sum(now.values())
        peaks: dict[str, tuple[int, dict[str, int]]] = {}
        stops = [*[start for start, _ in self.phases[1:]], len(self.events)]
        for (start, phase), stop in zip(self.phases, stops, strict=True):
            # What is in use when a stretch begins belongs to the one before, unless the phase is new.
            peaks.setdefault(phase, (total, dict(now)))
            for event in self.events[start:stop]:
                number, sign = (event, 1) if event >= 0 else (~event, -1)
                now[self.kinds[number]] += sign * counted[number]
                total += sign * counted[number]
                if event >= 0 and total > peaks[phase][0]:
                    peaks[phase] = total, dict(now)
        return {phase: MemoryBreakdown(**{kind: found[kind] for kind in KINDS}) for phase, (_, found) in peaks.items()}

    def _add(self, num_bytes: int, kind: Kind) -> int:
        self.num_bytes.append(num_bytes)
        self.kinds.append(kind)
        return len(self.num_bytes) - 1
