"""A training: what one optimizer did, cut into windows: the backward passes whose gradients one step used.

A case: all that is known about a script after it ran, for the rules to judge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from gradfold.doctor.events import Backward, Event, EventLog, Step, ZeroGrad
from gradfold.memory.system import Memory

__all__: list[str] = []

E = TypeVar("E", bound=Event)
_FETCHED_AHEAD = 0.9
CallPath = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class UpdateWindow:
    """The backward passes that one step used.

    Attributes:
        step: the step.
        backwards: those that no step had used before, oldest first.
        num_stale: how many more there were, used by an earlier step already.
        after: number of the event before which the window had not begun: the last step of the same optimizer.
    """

    step: Step
    backwards: tuple[Backward, ...]
    num_stale: int
    after: int

    @cached_property
    def micro_batches(self) -> tuple[Backward, ...]:
        """One backward pass per micro-batch: each its batch of one loader, or those from the same line."""
        some = self.backwards
        fetches = {one.fetches for one in some}
        if len(fetches) == len(some) and 0 not in fetches and len({one.loader for one in some}) == 1:
            return some
        return main_line(some)

    def __len__(self) -> int:
        return len(self.micro_batches)

    @property
    def is_by_gradfold(self) -> bool:
        """Whether gradfold ran it."""
        return any(one.is_gradfold for one in self.backwards)

    @cached_property
    def is_distinct(self) -> bool | None:
        """Whether its micro-batches are parts of the data, and not several losses of one; None where not known."""
        some = self.micro_batches
        if len(some) < 2 or self.is_by_gradfold or any(one.keeps_graph for one in some):
            return False
        reached = {one.census.parameters for one in some if one.census is not None}
        return len({one.touched for one in some}) == 1 and len(reached) < 2 and are_distinct(some)

    @property
    def crosses_passes(self) -> bool:
        """Whether its micro-batches come from two passes over the data."""
        return len({pass_of(one) for one in self.micro_batches}) > 1


@dataclass(frozen=True)
class OptimizerHistory:
    """What one optimizer did.

    Attributes:
        ledger: number of the optimizer.
        optimizer: name of its class.
        windows: in order.
        clears: gradients zeroed that no step had used.
        pending: backward passes that no step had used when the script ended.
        tape: all events.
    """

    ledger: int
    optimizer: str
    windows: tuple[UpdateWindow, ...]
    clears: tuple[ZeroGrad, ...]
    pending: tuple[Backward, ...]
    tape: EventLog = field(repr=False)

    @cached_property
    def accumulating(self) -> tuple[UpdateWindow, ...]:
        """The windows that add up several micro-batches; those that were not looked at are as most others."""
        known = [one.is_distinct for one in self.windows if one.is_distinct is not None and len(one) > 1]
        usually = 2 * sum(known) > len(known)
        return tuple(one for one in self.windows if one.is_distinct or (one.is_distinct is None and usually))

    @cached_property
    def usual(self) -> int:
        """How many micro-batches a window has: the most common number, the larger of two that are as common."""
        within = [len(one) for one in self.windows if not one.crosses_passes and not one.num_stale and len(one)]
        sizes = within or [len(one) for one in self.windows if len(one)]
        counted = Counter(sizes)
        return max(counted, key=lambda size: (counted[size], size)) if counted else 0

    @property
    def accumulates(self) -> bool:
        """Whether windows usually have several micro-batches."""
        return self.usual > 1 and 2 * len(self.accumulating) >= len(self.windows)

    @cached_property
    def full(self) -> tuple[UpdateWindow, ...]:
        """The accumulating windows of the usual length."""
        return tuple(one for one in self.accumulating if len(one) == self.usual)

    @cached_property
    def lines(self) -> frozenset[CallPath]:
        """The calls whose backward passes reach a step."""
        return frozenset(one.path for window in self.windows for one in window.backwards)

    def inside(self, window: UpdateWindow, kind: type[E]) -> list[E]:
        """Events of a kind between a window's first and last backward pass."""
        some = window.micro_batches or window.backwards
        return [one for one in self.tape.events[some[0].at : some[-1].at] if isinstance(one, kind)] if some else []

    def around(self, window: UpdateWindow, kind: type[E]) -> list[E]:
        """Events of a kind between the step before a window and its own."""
        return [one for one in self.tape.events[window.after : window.step.at] if isinstance(one, kind)]

    def backward(self, index: int) -> Backward:
        """A backward pass by its number."""
        return self.tape.backwards[index]


def trainings(tape: EventLog, pending: dict[int, tuple[int, ...]], names: Sequence[str]) -> list[OptimizerHistory]:
    """One per optimizer, in order of making.

    Args:
        tape: all events.
        pending: by optimizer's number, the backward passes that no step had used at the end.
        names: of the optimizers' classes.
    """
    found = []
    for number, name in enumerate(names):
        steps = [one for one in tape.events if isinstance(one, Step) and one.ledger == number]
        windows, after = [], 0
        for step in steps:
            fresh = tuple(tape.backwards[index] for index in step.entries[step.num_stale :])
            windows.append(UpdateWindow(step, fresh, step.num_stale, after))
            after = step.at
        clears = tuple(one for one in tape.events if isinstance(one, ZeroGrad) and one.ledger == number)
        clears = tuple(one for one in clears if not any(tape.backwards[index].is_gradfold for index in one.entries))
        left = tuple(tape.backwards[index] for index in pending.get(number, ()))
        found.append(OptimizerHistory(number, name, tuple(windows), clears, left, tape))
    return found


def main_line(backwards: Iterable[Backward]) -> tuple[Backward, ...]:
    """Those from the line that most of them come from; of two the later."""
    by_line: dict[CallPath, list[Backward]] = {}
    for one in backwards:
        by_line.setdefault(one.path, []).append(one)
    longest: list[Backward] = max(by_line.values(), key=lambda some: (len(some), some[-1].index), default=[])
    return tuple(longest)


def pass_of(one: Backward) -> tuple[object, ...]:
    """Which pass over the data a micro-batch belongs to, as far as loaders or the loops around it tell."""
    if one.loader is not None:
        return one.loader, one.pass_number
    return one.turns[:-1]


def are_distinct(some: Sequence[Backward]) -> bool | None:
    """Whether backward passes saw data of their own: each its batch of a loader, or inputs that differ.

    None where their graphs were not looked at.
    """
    if len({one.fetches for one in some}) == len(some) and some[-1].fetches:
        return len({one.loader for one in some}) == 1
    are_fetched_ahead = some[-1].fetches > _FETCHED_AHEAD * some[-1].index  # as many batches as backward passes
    is_more_than_parts = sum(one.rows for one in some) > max(one.fetched_rows for one in some)
    if some[-1].fetches and is_more_than_parts and not are_fetched_ahead:
        return False  # several losses, or views, of one batch
    signatures = [_signature(one) for one in some]
    if any(signature is None for signature in signatures):
        return None
    return len(set(signatures)) == len(signatures)


def _signature(one: Backward) -> tuple[object, ...] | None:
    if one.census is not None and one.census.inputs:
        return tuple(tuple(numbers.tolist()) for numbers in one.census.inputs)
    targets = [term.target for term in one.terms if term.target is not None]
    return None if not targets else tuple((target.data_ptr(), target.numel()) for target in targets)


@dataclass(frozen=True)
class UnoptimizedParameter:
    """Parameters that get gradients and are in no optimizer.

    Attributes:
        names: of the parameters.
        num_elements: of all together.
        num_backwards: backward passes that gave them gradients.
        first: number of the first of these.
    """

    names: tuple[str, ...]
    num_elements: int
    num_backwards: int
    first: int


@dataclass(frozen=True)
class RunRecord:
    """What is known.

    Attributes:
        script: the file.
        tape: all events.
        trainings: one per optimizer.
        ended: whether the script came to its own end.
        memory: peak and available memory.
        batch_norms: names of the BatchNorm layers in the user's models, by the running mean's address.
        stray: parameters that no optimizer has, None where there are none.
        precisions: dtypes of autocast regions.
        seconds: how long the script trained after its first step, without the doctor's own work.
        since: number of the first event of that time.
    """

    script: Path
    tape: EventLog = field(repr=False)
    trainings: tuple[OptimizerHistory, ...]
    ended: bool
    memory: Memory
    batch_norms: dict[int, str]
    stray: UnoptimizedParameter | None
    precisions: frozenset[str]
    seconds: float
    since: int

    @cached_property
    def accumulating(self) -> tuple[OptimizerHistory, ...]:
        """The optimizers that usually add up several micro-batches."""
        return tuple(one for one in self.trainings if one.accumulates)

    def events(self, kind: type[E]) -> list[E]:
        """All events of a kind."""
        return [one for one in self.tape.events if isinstance(one, kind)]
