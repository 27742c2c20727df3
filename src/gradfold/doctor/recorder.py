"""The recorder: the event log of a script, and the provenance of the gradients of all its optimizers."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.optim import Optimizer

from gradfold.doctor.events import EventLog, LoaderState, ZeroGrad
from gradfold.doctor.gradient_state import CLEARED, UNCHANGED, GradientProvenance, PreciseSums, UnoptimizedParameters
from gradfold.doctor.instrumentation import Guard
from gradfold.doctor.source import SourceLocation, SourceMap, zeroing_location
from gradfold.doctor.stop import Stop


class Stopwatch:
    """How long the script trains after its first step, without the doctor's own work."""

    since = 0  # number of the first event after that step; 0 before it
    own_s = 0.0  # how long the doctor's own work took since then
    _start_s: float | None = None

    def start(self, since: int) -> None:
        """A step was made; after the first one this changes nothing."""
        if self._start_s is None:
            self.since, self._start_s, self.own_s = since, time.perf_counter(), 0.0

    def seconds(self) -> float:
        """So far."""
        return 0.0 if self._start_s is None else time.perf_counter() - self._start_s - self.own_s


class Recorder:
    """What the hooks write to, and what they must know of each other."""

    def __init__(self, script: Path, stop: Stop, guard: Guard) -> None:
        self.source = SourceMap(script)
        self.log = EventLog()
        self.stop = stop
        self.stopwatch = Stopwatch()
        self.loader_state = LoaderState()
        self.provenances: list[GradientProvenance] = []
        self.unoptimized = UnoptimizedParameters()
        self.precise_sums = PreciseSums(guard)
        # The `Optimizer.step` that are running, one inside the other, and how many backward passes preceded each.
        self.open_steps: list[tuple[GradientProvenance, int]] = []
        self.unscaled: set[int] = set()  # the optimizers whose gradients a GradScaler has unscaled
        self.autocast_dtypes: set[str] = set()  # of regions that were entered
        self.is_paused = False  # whether this is the doctor's own work, or inside a call that is recorded already

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing that happens inside."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    def provenance_of(self, optimizer: Optimizer) -> GradientProvenance:
        """The provenance of an optimizer's gradients; a new one where it is met for the first time."""
        for provenance in self.provenances:
            if provenance.optimizer() is optimizer:
                return provenance
        provenance = GradientProvenance(weakref.ref(optimizer), type(optimizer).__name__, len(self.provenances))
        provenance.backwards = self.unoptimized.backwards_of(provenance.watched())
        for other in self.provenances:  # what another optimizer of the same parameters has left
            if other.shares_with(provenance) and any(one.grad is not None for one in provenance.watched()):
                provenance.backwards = sorted({*provenance.backwards, *other.unused})
                other.num_stepped = len(other.backwards)
        self.provenances.append(provenance)
        provenance.remember()
        provenance.remember_parameters()
        return provenance

    def optimized_ids(self) -> set[int]:
        """Ids of the parameters that are in an optimizer."""
        optimizers = [optimizer for one in self.provenances if (optimizer := one.optimizer()) is not None]
        return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}

    def detect_changes(self, location: SourceLocation | None = None) -> None:
        """Find what was done to gradients since the last event, at `location` if that is known."""
        for provenance in self.provenances:
            ratio = provenance.change()
            if ratio == UNCHANGED:
                continue
            if ratio == CLEARED:
                self._clear(provenance, location)
            elif math.isnan(ratio):
                provenance.is_rewritten = True
            else:
                provenance.ratio *= ratio
            provenance.remember()

    def _clear(self, provenance: GradientProvenance, location: SourceLocation | None) -> None:
        lost, log = provenance.unused, self.log
        if lost:
            is_used = bool(self.open_steps) or provenance.parameters_changed() or provenance.is_rewritten
            location = location or zeroing_location(self.source.here(), log.backwards[lost[-1]].location)
            log.add(ZeroGrad, location, provenance.number, lost, is_used)
        provenance.clear()
        self.unscaled.discard(provenance.number)
        self.precise_sums.clear(provenance.number)
