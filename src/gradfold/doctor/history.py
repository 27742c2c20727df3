"""The history of a run, for the rules to check: what each optimizer did, window by window, and what else is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from gradfold.doctor.events import Backward, E, EventLog, Step, ZeroGrad
from gradfold.doctor.source import CallPath
from gradfold.memory.system import Memory

_FETCHED_AHEAD = 0.9


@dataclass(frozen=True)
class UpdateWindow:
    """The backward passes that one step used."""

    step: Step
    backwards: tuple[Backward, ...]  # those that no step had used before, oldest first
    begins_after: int  # number of the last step of the same optimizer among all events

    @cached_property
    def micro_batches(self) -> tuple[Backward, ...]:
        """One backward pass per micro-batch: each its batch of one loader, or those from the same line."""
        if _have_own_batches(self.backwards):
            return self.backwards
        return most_common_line(self.backwards)

    def __len__(self) -> int:
        return len(self.micro_batches)

    @property
    def is_by_gradfold(self) -> bool:
        """Whether gradfold ran it."""
        return any(one.context.is_gradfold for one in self.backwards)

    @cached_property
    def is_distinct(self) -> bool | None:
        """Whether its micro-batches are parts of the data, and not several losses of one; None where unknown."""
        some = self.micro_batches
        if len(some) < 2 or self.is_by_gradfold or any(one.retains_graph for one in some):
            return False
        reached = {one.graph.parameters for one in some if one.graph.is_walked}
        return len({one.optimizers for one in some}) == 1 and len(reached) < 2 and _have_own_data(some)

    @property
    def crosses_epochs(self) -> bool:
        """Whether its micro-batches come from two epochs."""
        return len({epoch_of(one) for one in self.micro_batches}) > 1


@dataclass(frozen=True)
class OptimizerHistory:
    """What one optimizer did."""

    number: int
    optimizer: str  # name of its class
    pending: tuple[Backward, ...]  # those that no step had used when the script ended
    log: EventLog = field(repr=False)

    @cached_property
    def windows(self) -> tuple[UpdateWindow, ...]:
        """One per step."""
        steps = [one for one in self.log.of(Step) if one.optimizer == self.number]
        new = [self.log.backwards_at(step.backwards[step.num_reused :]) for step in steps]
        return tuple(map(UpdateWindow, steps, new, [0, *(step.at for step in steps)]))

    @cached_property
    def zero_grads(self) -> tuple[ZeroGrad, ...]:
        """Those by the user that zeroed gradients no step had used."""
        some = [one for one in self.log.of(ZeroGrad) if one.optimizer == self.number]
        backwards_at = self.log.backwards_at
        return tuple(one for one in some if not any(b.context.is_gradfold for b in backwards_at(one.backwards)))

    @cached_property
    def accumulating(self) -> tuple[UpdateWindow, ...]:
        """The windows that sum several micro-batches; where that is unknown, as most others."""
        known = [one.is_distinct for one in self.windows if one.is_distinct is not None and len(one) > 1]
        usually = 2 * sum(known) > len(known)
        return tuple(one for one in self.windows if one.is_distinct or (one.is_distinct is None and usually))

    @cached_property
    def micro_batches(self) -> tuple[Backward, ...]:
        """Those of the accumulating windows."""
        return tuple(one for window in self.accumulating for one in window.micro_batches)

    @cached_property
    def window_length(self) -> int:
        """How many micro-batches a window has: the most common number, the larger of two that are as common."""
        within = [len(one) for one in self.windows if not one.crosses_epochs and not one.step.num_reused and len(one)]
        counted = Counter(within or [len(one) for one in self.windows if len(one)])
        return max(counted, key=lambda size: (counted[size], size)) if counted else 0

    @property
    def accumulates(self) -> bool:
        """Whether windows usually have several micro-batches."""
        return self.window_length > 1 and 2 * len(self.accumulating) >= len(self.windows)

    @cached_property
    def full(self) -> tuple[UpdateWindow, ...]:
        """The accumulating windows of the usual length."""
        return tuple(one for one in self.accumulating if len(one) == self.window_length)

    @cached_property
    def call_paths(self) -> frozenset[CallPath]:
        """The calls whose backward passes reach a step."""
        return frozenset(one.context.call_path for window in self.windows for one in window.backwards)

    def inside(self, window: UpdateWindow, kind: type[E]) -> list[E]:
        """Events of a kind between a window's first and last backward pass."""
        some = window.micro_batches or window.backwards
        return self.log.between(some[0].at, some[-1].at, kind) if some else []

    def around(self, window: UpdateWindow, kind: type[E]) -> list[E]:
        """Events of a kind between the step before a window and its own."""
        return self.log.between(window.begins_after, window.step.at, kind)


def most_common_line(backwards: Sequence[Backward]) -> tuple[Backward, ...]:
    """Those from the line that most of them come from; of two the later."""
    paths = [one.context.call_path for one in backwards]
    most = max(reversed(paths), key=Counter(paths).__getitem__, default=())
    return tuple(one for one in backwards if one.context.call_path == most)


def epoch_of(one: Backward) -> Hashable:
    """The epoch that a micro-batch belongs to, as far as loaders or the loops around it tell."""
    state = one.loader_state
    return one.context.loops[:-1] if state.loader is None else (state.loader, state.epoch)


def _have_own_batches(some: Sequence[Backward]) -> bool:
    """Whether each backward pass has a batch of its own, all from one loader."""
    fetches = {one.loader_state.num_fetched for one in some}
    return len(fetches) == len(some) and 0 not in fetches and len({one.loader_state.loader for one in some}) == 1


def _have_own_data(some: Sequence[Backward]) -> bool | None:
    """Whether each backward pass has data of its own: a batch, or inputs that differ; None where unknown."""
    fetches = [one.loader_state.num_fetched for one in some]
    if len(set(fetches)) == len(some) and fetches[-1]:
        return len({one.loader_state.loader for one in some}) == 1
    are_fetched_ahead = fetches[-1] > _FETCHED_AHEAD * some[-1].index  # as many batches as backward passes
    is_more_than_parts = sum(one.rows for one in some) > max(one.loader_state.rows for one in some)
    if fetches[-1] and is_more_than_parts and not are_fetched_ahead:
        return False  # several losses, or views, of one batch
    signatures = [_signature(one) for one in some]
    if any(signature is None for signature in signatures):
        return None
    return len(set(signatures)) == len(signatures)


def _signature(one: Backward) -> tuple[object, ...] | None:
    if one.graph.inputs:
        return tuple(tuple(numbers.tolist()) for numbers in one.graph.inputs)
    targets = [term.target for term in one.terms if term.target is not None]
    return tuple((target.data_ptr(), target.numel()) for target in targets) or None


@dataclass(frozen=True)
class RunRecord:
    """All that is known of a script after it ran."""

    log: EventLog = field(repr=False)
    optimizers: tuple[OptimizerHistory, ...]
    has_ended: bool  # whether the script came to its own end
    memory: Memory
    batch_norms: dict[int, str]  # names of the BatchNorm layers in the user's models, by the running mean's address
    # The parameters that get gradients and are in no optimizer, each with these backward passes; and their names.
    missing: dict[Tensor, list[int]]
    missing_names: tuple[str, ...]
    autocast_dtypes: frozenset[str]
    seconds: float  # how long the script trained after its first step, without the doctor's own work
    since: int  # number of the first event of that time

    @cached_property
    def accumulating(self) -> tuple[OptimizerHistory, ...]:
        """The optimizers that usually sum several micro-batches."""
        return tuple(one for one in self.optimizers if one.accumulates)
