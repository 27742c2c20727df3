"""Events: the calls of a script that matter to its training, each with the line that made it, in one log.

Optimizers, loaders and backward passes are numbered from 0, in order of appearance; scalers and schedulers have ids.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

from gradfold.doctor.graph_stats import GraphStats
from gradfold.doctor.source import CallContext, SourceLocation
from gradfold.engine.loss_graph import DividedTerm


@dataclass(frozen=True)
class Event:
    """One call."""

    at: int  # its number among all events
    location: SourceLocation


E = TypeVar("E", bound=Event)
P = ParamSpec("P")


@dataclass(frozen=True)
class EpochStart(Event):
    """An iteration over a loader begins."""

    loader: int
    length: int | None  # in batches, None where the loader does not say


@dataclass(frozen=True)
class Fetch(Event):
    """A loader returns a batch, or ends its epoch. The location is not determined."""

    loader: int
    is_end: bool  # of the epoch
    seconds: float  # how long the script waited


@dataclass(frozen=True)
class LoaderState:
    """Which batch the script has fetched last."""

    loader: int | None = None  # None before the first batch
    epoch: int = 0  # over that loader, from 1
    rows: int = 0  # of the batch's first tensor, 0 where it has none
    num_fetched: int = 0  # batches so far, of all loaders


class DdpSync(NamedTuple):
    """What a DistributedDataParallel does in one backward pass."""

    is_prepared: bool  # whether its forward pass prepared a reduction
    is_allowed: bool  # whether the backward pass ran outside `no_sync`
    num_bytes: int  # of its gradients


@dataclass(frozen=True)
class Backward(Event):
    """A backward pass."""

    index: int  # of the pass, from 0
    seconds: float
    context: CallContext
    terms: tuple[DividedTerm, ...]  # what the loss consists of
    graph: GraphStats
    loader_state: LoaderState
    rows: int  # of the micro-batch, 0 where unknown
    optimizers: tuple[int, ...]  # those whose parameters it gave gradients to
    retains_graph: bool
    is_scaled: bool  # whether a GradScaler had scaled the loss
    has_hooks: bool  # whether the user's hooks may have changed the gradients
    dtypes: frozenset[str]  # of the gradients it left
    ddp: tuple[DdpSync, ...] = ()


@dataclass(frozen=True)
class Step(Event):
    """An optimizer makes a step."""

    optimizer: int
    seconds: float
    backwards: tuple[int, ...]  # those whose sum it used, oldest first
    num_reused: int  # how many of them an earlier step had used
    ratio: float  # what the gradients were multiplied by, outside of backward passes
    is_rewritten: bool  # whether they were changed in another way
    gradients: str  # "new", "none" (no parameter has one), "zero" (all are) or "stale" (an earlier step's)
    through_scaler: bool  # whether `GradScaler.step` made it
    has_closure: bool  # whether backward passes ran inside
    rounding: float | None = None  # relative error of gradients summed in low precision, where it was measured


@dataclass(frozen=True)
class ZeroGrad(Event):
    """Gradients are zeroed that no step has used."""

    optimizer: int
    backwards: tuple[int, ...]  # those that are lost
    is_used: bool  # whether something else used them: parameters changed without a step, or a closure's caller


@dataclass(frozen=True)
class Clip(Event):
    """Gradients are clipped."""

    kind: str  # "norm" or "value"
    limit: float
    norm: float | Tensor | None  # before clipping, for kind "norm"
    backwards: dict[int, tuple[int, ...]]  # by optimizer, those whose sum was clipped
    scaled: frozenset[int]  # the optimizers whose gradients still carry the loss scale


@dataclass(frozen=True)
class ScalerCall(Event):
    """A GradScaler's method is called."""

    call: str  # "unscale_", "step" or "update"
    scaler: int
    backwards: dict[int, tuple[int, ...]]  # by optimizer, those whose sum is in `.grad`; all optimizers for "update"
    error: str = ""  # what it raised


@dataclass(frozen=True)
class SchedulerStep(Event):
    """A learning-rate scheduler makes a step."""

    scheduler: int
    name: str  # of the scheduler's class
    optimizer: int | None
    horizon: int | None  # how many steps the schedule is long, where it says
    before: float  # the learning rate of the first group
    after: float


@dataclass(frozen=True)
class Read(Event):
    """The host reads what was computed: `.item()`, `.cpu()`, `bool(tensor)` and so on."""

    call: str
    seconds: float
    num_backwards: int  # so far
    device: str


class EventLog:
    """All events in order, and by kind."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._by_kind: dict[type, list[Any]] = defaultdict(list)

    def add(self, kind: Callable[Concatenate[int, P], Event], *fields: P.args, **named_fields: P.kwargs) -> None:
        """Append an event of a kind, with its fields but for `at`."""
        event = kind(len(self.events), *fields, **named_fields)
        self.events.append(event)
        self._by_kind[type(event)].append(event)

    def of(self, kind: type[E]) -> list[E]:
        """All events of a kind."""
        return self._by_kind[kind]

    def between(self, first: int, last: int | None, kind: type[E]) -> list[E]:
        """The events of a kind whose numbers are at least `first` and below `last`; None for all later ones."""
        return [one for one in self.events[first:last] if isinstance(one, kind)]

    @property
    def backwards(self) -> list[Backward]:
        """All backward passes; `backwards[index].index == index`."""
        return self.of(Backward)

    def backwards_at(self, indices: Iterable[int]) -> tuple[Backward, ...]:
        """Some backward passes."""
        return tuple(self.backwards[index] for index in indices)
