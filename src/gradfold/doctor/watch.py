"""A watch over a training script: the ledgers of all its optimizers, and the tape of what happened to gradients."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from gradfold.doctor.events import Clear, Tape
from gradfold.doctor.feeding import Feeding
from gradfold.doctor.guard import Guard
from gradfold.doctor.ledger import Ledger
from gradfold.doctor.place import Map, Place
from gradfold.doctor.precise_sum import PreciseSums
from gradfold.doctor.stop import Stop
from gradfold.doctor.stopwatch import Stopwatch
from gradfold.doctor.strays import Strays
from gradfold.doctor.zeroing import zeroing_line

__all__: list[str] = []


class Watch:
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
        self.map = Map(script)
        self.tape = Tape()
        self.stop = stop
        self.stopwatch = Stopwatch()
        self.feeding = Feeding(self.tape, self.map, stop)
        self.ledgers: list[Ledger] = []
        self.strays = Strays()
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

    def ledger_of(self, optimizer: Optimizer) -> Ledger:
        """The ledger of an optimizer, opened where there is none yet."""
        for ledger in self.ledgers:
            if ledger.optimizer() is optimizer:
                return ledger
        ledger = Ledger(weakref.ref(optimizer), len(self.ledgers))
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

    def standing(self, ledgers: list[Ledger] | None = None) -> dict[int, tuple[int, ...]]:
        """By optimizer's number, the backward passes in `.grad` that no step has used."""
        chosen = self.ledgers if ledgers is None else ledgers
        return {one.number: tuple(one.entries[one.stepped :]) for one in chosen if one.entries[one.stepped :]}

    def settle(self, place: Place | None = None) -> None:
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

    def _clear(self, ledger: Ledger, place: Place | None) -> None:
        lost = tuple(ledger.entries[ledger.stepped :])
        if lost:
            used = self.num_open_steps > 0 or ledger.parameters_moved() or ledger.is_rewritten
            where = place or zeroing_line(self.map.here(), self.tape.backwards[lost[-1]].place)
            self.tape.add(Clear(self.tape.next, where, ledger.number, lost, used))
        ledger.empty()
        self.unscaled.discard(ledger.number)
        self.precise_sums.empty(ledger.number)
