"""An event: one call that matters to training, with the user's line that made it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gradfold.doctor.graph_stats import GraphStats
from gradfold.doctor.loss_graph import DividedTerm
from gradfold.doctor.source import SourceLocation

__all__: list[str] = []

Turns = tuple[tuple[str, int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Event:
    """What all events have.

    Attributes:
        at: its number among all events.
        place: the user's line.
    """

    at: int
    place: SourceLocation


@dataclass(frozen=True)
class EpochStart(Event):
    """An iteration over a loader begins.

    Attributes:
        loader: which loader, counted from 0.
        length: its number of batches, None where it does not say.
    """

    loader: int
    length: int | None


@dataclass(frozen=True)
class Fetch(Event):
    """A loader gives a batch. Its place is not looked for.

    Attributes:
        loader: which loader.
        number: of the batch in its pass, from 0; -1 where the pass has ended.
        rows: of the batch's first tensor, 0 where it has none.
        seconds: how long the loop waited.
    """

    loader: int
    number: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Backward(Event):
    """A backward pass.

    Attributes:
        index: of the pass, from 0.
        seconds: how long it took.
        turns: the loops around the line.
        path: the user's calls that led there, innermost first.
        is_gradfold: whether gradfold ran it.
        terms: what the loss consists of.
        census: what stands in its graph, where it was looked through.
        fetches: how many batches had been fetched, and which pass of which loader the last was from.
        rows: of the micro-batch, 0 where unknown.
        fetched_rows: of the batch that was fetched last.
        touched: numbers of the optimizers whose parameters it gave gradients to.
        keeps_graph: whether `retain_graph=True`.
        is_scaled: whether a GradScaler had scaled the loss.
        is_hooked: whether hooks of the user's may have changed the gradients.
        dtypes: of the gradients it left.
        syncs: of each DistributedDataParallel: whether its forward pass prepared a reduction, whether the backward
            pass was outside `no_sync`, and the bytes of its gradients.
    """

    index: int
    seconds: float
    turns: Turns
    path: tuple[tuple[str, int], ...]
    is_gradfold: bool
    terms: tuple[DividedTerm, ...]
    census: GraphStats | None
    fetches: int
    loader: int | None
    pass_number: int
    rows: int
    fetched_rows: int
    touched: tuple[int, ...]
    keeps_graph: bool
    is_scaled: bool
    is_hooked: bool
    dtypes: frozenset[str]
    syncs: tuple[tuple[bool, bool, int], ...] = ()


@dataclass(frozen=True)
class Step(Event):
    """An optimizer makes a step.

    Attributes:
        ledger: number of the optimizer.
        optimizer: name of its class.
        seconds: how long it took.
        entries: the backward passes whose sum it used, oldest first.
        num_stale: how many of them an earlier step had used.
        ratio: what the gradients were multiplied by hand.
        is_rewritten: whether they were changed by hand in another way.
        gradients: "new", "none" (no parameter has one), "zero" (all are) or "stale" (nothing new since the last step).
        through_scaler: whether `GradScaler.step` made it.
        has_closure: whether backward passes ran inside.
        rounding: relative error of the gradients for having been summed in a low precision, where that was measured.
    """

    ledger: int
    optimizer: str
    seconds: float
    entries: tuple[int, ...]
    num_stale: int
    ratio: float
    is_rewritten: bool
    gradients: str
    through_scaler: bool
    has_closure: bool
    rounding: float | None = None


@dataclass(frozen=True)
class ZeroGrad(Event):
    """Gradients are zeroed that no step has used.

    Attributes:
        ledger: whose gradients.
        entries: the backward passes that are lost.
        is_used: whether something else used them: a step that moved the parameters by hand, or a closure's caller.
    """

    ledger: int
    entries: tuple[int, ...]
    is_used: bool


@dataclass(frozen=True)
class Clip(Event):
    """Gradients are clipped.

    Attributes:
        kind: "norm" or "value".
        limit: the largest norm or value allowed.
        norm: the norm found, for kind "norm".
        entries: by optimizer's number, the backward passes whose sum was clipped.
        scaled: numbers of the optimizers whose gradients still carry the loss scale.
    """

    kind: str
    limit: float
    norm: float | Tensor | None
    entries: dict[int, tuple[int, ...]]
    scaled: frozenset[int]


@dataclass(frozen=True)
class Scaler(Event):
    """A GradScaler is called.

    Attributes:
        call: "unscale_", "step" or "update".
        ledgers: of whose optimizer; of all for "update".
        entries: by optimizer's number, the backward passes whose sum stood in `.grad`.
        error: what it raised, if it did.
    """

    call: str
    scaler: int
    entries: dict[int, tuple[int, ...]]
    error: str = ""


@dataclass(frozen=True)
class SchedulerStep(Event):
    """A learning-rate scheduler makes a step.

    Attributes:
        scheduler: which, counted from 0.
        name: of its class.
        horizon: how many ticks it was made for, where it says so.
        before, after: the learning rate of the first group.
    """

    scheduler: int
    name: str
    ledger: int | None
    horizon: int | None
    before: float
    after: float


@dataclass(frozen=True)
class Read(Event):
    """The host reads what was computed: `.item()`, `.cpu()`, `bool(tensor)` and so on.

    Attributes:
        call: how.
        seconds: how long it took.
        num_backwards: backward passes so far.
        device: of the tensor.
    """

    call: str
    seconds: float
    num_backwards: int
    device: str


@dataclass
class EventLog:
    """All events in order, and by kind."""

    events: list[Event] = field(default_factory=list)
    backwards: list[Backward] = field(default_factory=list)

    @property
    def next(self) -> int:
        """The number of the next event."""
        return len(self.events)

    def add(self, event: Event) -> None:
        """Record an event."""
        self.events.append(event)
        if isinstance(event, Backward):
            self.backwards.append(event)
