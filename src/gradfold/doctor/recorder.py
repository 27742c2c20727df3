"""A watch over a training script: the ledgers of all its optimizers, and the tape of what happened to gradients.

The stop: when enough of a script was seen, and how it is ended.

A feeding: which batch of which loader, in which of its passes, the script has fetched last.

A stopwatch: how long the script trains after its first step, without the doctor's own work.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradfold.doctor.events import EpochStart, EventLog, Fetch, ZeroGrad
from gradfold.doctor.gradient_state import GradientProvenance, PreciseSums, UnoptimizedParameters
from gradfold.doctor.instrumentation import Guard
from gradfold.doctor.source import NOWHERE, SourceLocation, SourceMap, zeroing_line

__all__: list[str] = []

_FURTHER = 4  # times as far as the updates asked for, to see an epoch end
_MOST_SWALLOWED = 20


class EnoughError(BaseException):
    """Ends the script from inside. No `Exception`, so that scripts that catch theirs let it through. Internal."""


class TimedOutError(EnoughError):
    """Ends a script that ran past its time. Internal."""


class Stop:
    """Counts updates and passes over the data.

    Args:
        num_updates: how many updates to watch.

    Attributes:
        was_reached: whether the script was ended for having been seen enough.
        on_swallowed: called where the script catches the stop again and again; it ends the process.
    """

    def __init__(self, num_updates: int) -> None:
        self.num_updates = num_updates
        self.was_reached = False
        self.on_swallowed: Callable[[], None] | None = None
        self._steps: dict[int, int] = {}
        self._num_passes: dict[int, int] = {}
        self._lengths: dict[int, int | None] = {}
        self._steps_since_pass = 0
        self._backwards_then = 0
        self._num_raised = 0

    def note_step(self, ledger: int) -> None:
        """An optimizer made a step."""
        self._steps[ledger] = self._steps.get(ledger, 0) + 1
        self._steps_since_pass += 1

    def note_pass(self, loader: int, length: int | None) -> None:
        """A pass over a loader begins."""
        self._num_passes[loader] = self._num_passes.get(loader, 0) + 1
        self._lengths[loader] = length
        if self._num_passes[loader] > 1:
            self._steps_since_pass = 0

    def check(self, tape: EventLog) -> None:
        """Raise where enough was seen; called when a backward pass begins, so that what follows a step was seen."""
        if self.was_reached or self._is_enough(tape):
            self.was_reached = True
            self._num_raised += 1
            if self._num_raised > _MOST_SWALLOWED and self.on_swallowed is not None:
                self.on_swallowed()
            raise EnoughError

    def _is_enough(self, tape: EventLog) -> bool:
        counts = self._steps.values()
        if not counts or (min(counts) < self.num_updates and max(counts) < _FURTHER * self.num_updates):
            return False
        num_backwards = len(tape.backwards)
        self._backwards_then = self._backwards_then or num_backwards
        if num_backwards >= 2 * _FURTHER * self._backwards_then:
            return True
        loader = tape.backwards[-1].loader
        if loader is None:
            return self._has_seen_turn(tape) or num_backwards >= _FURTHER * self._backwards_then
        if self._num_passes.get(loader, 0) > 1:
            return self._steps_since_pass >= 2  # the second pass's first window, and one that is as all others
        length = self._lengths.get(loader)
        return num_backwards >= _FURTHER * self._backwards_then or (
            length is not None and length > _FURTHER * self._backwards_then
        )

    def _has_seen_turn(self, tape: EventLog) -> bool:
        """Whether an outer loop of the user's went on to its next pass, two updates ago or more."""
        turns = [one.turns[:-1] for one in tape.backwards]
        changed = [index for index in range(1, len(turns)) if turns[index] != turns[index - 1]]
        return bool(changed) and len(turns) - changed[0] >= self._backwards_then // self.num_updates * 2


_DEPTH = 3  # to which a batch is searched for a tensor


class LoaderState:
    """Of all loaders of a script.

    Attributes:
        loader: the one that gave the last batch, counted from 0; None before the first.
        rows: of that batch.
        num_fetches: batches so far.
    """

    def __init__(self, tape: EventLog, places: SourceMap, stop: Stop) -> None:
        self.loader: int | None = None
        self.rows = 0
        self.num_fetches = 0
        self._tape = tape
        self._places = places
        self._stop = stop
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._passes: dict[int, int] = {}
        self._positions: dict[int, int] = {}

    @property
    def pass_number(self) -> int:
        """Of the last batch's pass over its loader, from 1."""
        return 0 if self.loader is None else self._passes[self.loader]

    def pass_begins(self, loader: Any) -> int:
        """An iteration over a loader begins: its number among loaders."""
        number = self._numbers.setdefault(loader, len(self._numbers))
        self._passes[number] = self._passes.get(number, 0) + 1
        self._positions[number] = 0
        try:
            length: int | None = len(loader)
        except (TypeError, NotImplementedError):
            length = None
        self._tape.add(EpochStart(self._tape.next, self._places.here(), number, length))
        self._stop.note_pass(number, length)
        return number

    def fetched(self, loader: int, batch: Any, seconds: float) -> None:
        """A loader gave a batch; None where its pass has ended."""
        position, rows = -1, 0
        if batch is not None:
            position, rows = self._positions[loader], _rows(batch)
            self._positions[loader] += 1
            self.num_fetches += 1
            self.loader, self.rows = loader, rows
        self._tape.add(Fetch(self._tape.next, NOWHERE, loader, position, rows, seconds))


def _rows(batch: Any, depth: int = 0) -> int:
    """Of the first tensor in a batch of any nesting."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    if depth > _DEPTH:
        return 0
    values = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, (list, tuple)) else ()
    return next((rows for value in list(values)[:8] if (rows := _rows(value, depth + 1))), 0)


class Stopwatch:
    """Stands still until the first step.

    Attributes:
        since: number of the first event after that step; 0 before it.
    """

    def __init__(self) -> None:
        self.since = 0
        self._start_s: float | None = None
        self._cost_s = 0.0

    def start(self, since: int) -> None:
        """The first step was made; later ones change nothing."""
        if self._start_s is None:
            self.since, self._start_s, self._cost_s = since, time.perf_counter(), 0.0

    def take_off(self, seconds: float) -> None:
        """Of the doctor's own work."""
        self._cost_s += seconds

    def read(self) -> float:
        """Seconds so far."""
        return 0.0 if self._start_s is None else time.perf_counter() - self._start_s - self._cost_s


class Recorder:
    """Keeps the ledgers of all optimizers and the tape of events.

    Args:
        script: the file that runs; its folder is the user's.
        stop: decides when enough was seen.
        guard: between the doctor's own work and the script.

    Attributes:
        is_quiet: above 0 inside the doctor's own work and inside a call that is watched already.
        num_open_steps: how many `Optimizer.step` are running, one inside the other.
        num_scaler_steps: how many `GradScaler.step` are running.
        unscaled: numbers of the optimizers whose gradients a GradScaler has unscaled.
        ddp_forwards: by id, the DistributedDataParallel modules that ran forward since the last backward pass, and
            whether they prepared a reduction.
        has_saved_hooks: whether saved tensors are packed by hooks.
        precisions: dtypes of autocast regions.
    """

    def __init__(self, script: Path, stop: Stop, guard: Guard) -> None:
        self.map = SourceMap(script)
        self.tape = EventLog()
        self.stop = stop
        self.stopwatch = Stopwatch()
        self.feeding = LoaderState(self.tape, self.map, stop)
        self.ledgers: list[GradientProvenance] = []
        self.strays = UnoptimizedParameters()
        self.precise_sums = PreciseSums(guard)
        self.is_quiet = 0
        self.num_open_steps = 0
        self.num_scaler_steps = 0
        self.unscaled: set[int] = set()
        self.ddp_forwards: dict[int, tuple[nn.Module, bool]] = {}
        self.has_saved_hooks = False
        self.precisions: set[str] = set()

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Watch nothing that happens inside."""
        self.is_quiet += 1
        try:
            yield
        finally:
            self.is_quiet -= 1

    def ledger_of(self, optimizer: Optimizer) -> GradientProvenance:
        """The ledger of an optimizer, opened where there is none yet."""
        for ledger in self.ledgers:
            if ledger.optimizer() is optimizer:
                return ledger
        ledger = GradientProvenance(weakref.ref(optimizer), len(self.ledgers))
        self.ledgers.append(ledger)
        ledger.entries = self.strays.entries(ledger.watched())
        for other in self.ledgers[:-1]:  # what another optimizer of the same parameters has left
            if other.shares_with(ledger) and any(one.grad is not None for one in ledger.watched()):
                ledger.entries = sorted({*ledger.entries, *other.entries[other.stepped :]})
                other.stepped = len(other.entries)
        ledger.remember()
        ledger.remember_parameters()
        return ledger

    def known(self) -> set[int]:
        """Ids of the parameters that have an optimizer."""
        optimizers = [optimizer for ledger in self.ledgers if (optimizer := ledger.optimizer()) is not None]
        return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}

    def standing(self, ledgers: list[GradientProvenance] | None = None) -> dict[int, tuple[int, ...]]:
        """By optimizer's number, the backward passes in `.grad` that no step has used."""
        chosen = self.ledgers if ledgers is None else ledgers
        return {one.number: tuple(one.entries[one.stepped :]) for one in chosen if one.entries[one.stepped :]}

    def settle(self, place: SourceLocation | None = None) -> None:
        """See what was done to gradients since the last event; `place` is where, if that is known."""
        for ledger in self.ledgers:
            change = ledger.change()
            if change.kind == "none":
                continue
            if change.kind == "cleared":
                self._clear(ledger, place)
            elif change.kind == "rescaled":
                ledger.ratio *= change.ratio
            else:
                ledger.is_rewritten = True
            ledger.remember()

    def _clear(self, ledger: GradientProvenance, place: SourceLocation | None) -> None:
        lost = tuple(ledger.entries[ledger.stepped :])
        if lost:
            used = self.num_open_steps > 0 or ledger.parameters_moved() or ledger.is_rewritten
            where = place or zeroing_line(self.map.here(), self.tape.backwards[lost[-1]].place)
            self.tape.add(ZeroGrad(self.tape.next, where, ledger.number, lost, used))
        ledger.empty()
        self.unscaled.discard(ledger.number)
        self.precise_sums.empty(ledger.number)
