"""A watch over a training script: what each call does to the gradients, written down as events."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradfold.doctor import census as graph
from gradfold.doctor.events import Backward, Clear, Step, Tape
from gradfold.doctor.feeding import Feeding
from gradfold.doctor.ledger import Ledger
from gradfold.doctor.loss_graph import Term, mark_of, terms_of
from gradfold.doctor.place import Map, Place, Surroundings
from gradfold.doctor.precise_sum import PreciseSums
from gradfold.doctor.stop import Stop
from gradfold.doctor.strays import Strays
from gradfold.doctor.zeroing import zeroing_line

__all__: list[str] = []

_MOST_CENSUSES = 48  # of the graphs of backward passes from one line


@dataclass
class _OpenPass:
    """What is known while a backward pass runs."""

    around: Surroundings
    terms: tuple[Term, ...]
    census: graph.Census | None
    is_scaled: bool
    keeps_graph: bool
    before: list[tuple[Ledger, list[Any]]]
    start_s: float


class Watch:
    """Keeps the ledgers of all optimizers and the tape of events.

    Args:
        script: the file that runs; its folder is the user's.
        stop: decides when enough was seen.

    Attributes:
        is_quiet: above 0 inside the doctor's own work and inside a call that is watched already.
        unscaled: numbers of the optimizers whose gradients a GradScaler has unscaled.
        num_scaler_steps: how many `GradScaler.step` are running.
        ddp_forwards: by id, the DistributedDataParallel modules that ran forward since the last backward pass, and
            whether they prepared a reduction.
        has_saved_hooks: whether saved tensors are packed by hooks.
        precisions: dtypes of autocast regions.
        cost_s: seconds of the doctor's own work.
        stretch: from where on time is measured: after the first step, since what comes before it warms up. The number
            of the first event, the clock and `cost_s` then; None before.
    """

    def __init__(self, script: Path, stop: Stop) -> None:
        self.map = Map(script)
        self.tape = Tape()
        self.stop = stop
        self.feeding = Feeding(self.tape, self.map, stop)
        self.ledgers: list[Ledger] = []
        self.strays = Strays()
        self.is_quiet = 0
        self.unscaled: set[int] = set()
        self.num_scaler_steps = 0
        self.ddp_forwards: dict[int, tuple[nn.Module, bool]] = {}
        self.has_saved_hooks = False
        self.precisions: set[str] = set()
        self.cost_s = 0.0
        self.stretch: tuple[int, float, float] | None = None
        self._precise = PreciseSums()
        self._steps: list[tuple[Ledger, int]] = []
        self._step_start_s = 0.0
        self._found: tuple[tuple[int, ...], int, str] = (), 0, "none"  # in `.grad` when the step began
        self._censuses: dict[Place, int] = {}

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

    # What the user's own code does to gradients

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
            used = bool(self._steps) or ledger.parameters_moved() or ledger.is_rewritten
            where = place or zeroing_line(self.map.here(), self.tape.backwards[lost[-1]].place)
            self.tape.add(Clear(self.tape.next, where, ledger.number, lost, used))
        ledger.empty()
        self.unscaled.discard(ledger.number)
        self._precise.empty(ledger.number)

    @contextmanager
    def zeroing(self) -> Iterator[None]:
        """Around a call that zeroes gradients."""
        if self.is_quiet:
            yield
            return
        with self.quietly():
            self.settle()
            yield
            self.settle(self.map.here())

    # Backward passes

    @contextmanager
    def backward(self, losses: list[Tensor], seeds: list[Tensor | None], keeps_graph: bool) -> Iterator[None]:
        """Around a backward pass; raises where enough was seen."""
        start = time.perf_counter()
        self.stop.check(self.tape)
        with self.quietly():
            self.settle()
            self._precise.prepare(self.ledgers)
            around = self.map.around()
            one = _OpenPass(
                around,
                tuple(term for loss, seed in zip(losses, seeds, strict=True) for term in terms_of(loss, seed)),
                self._census(around.place, losses),
                any(mark_of(loss) == "scaled" for loss in losses),
                keeps_graph,
                [(ledger, ledger.states()) for ledger in self.ledgers],
                time.perf_counter(),
            )
            self.cost_s += one.start_s - start
            yield
            end = time.perf_counter()
            self._note(one, end - one.start_s)
            self.cost_s += time.perf_counter() - end

    def _census(self, place: Place, losses: list[Tensor]) -> graph.Census | None:
        count = self._censuses.get(place, 0)
        if count >= _MOST_CENSUSES or len(losses) != 1 or losses[0].grad_fn is None:
            return None
        self._censuses[place] = count + 1
        try:
            return graph.take(losses[0], may_read=not self.has_saved_hooks)
        except (RuntimeError, AttributeError, TypeError):  # a node of an extension's, or one whose tensors are gone
            return None

    def _note(self, one: _OpenPass, seconds: float) -> None:
        index = len(self.tape.backwards)
        touched = [ledger for ledger, before in one.before if ledger.states() != before]
        for ledger in touched:
            ledger.entries.append(index)
            ledger.remember()
            ledger.remember_parameters()
        if one.census is not None:
            self.strays.note(one.census.leaves, self.known(), index)
            one.census.leaves = []
        feeding = self.feeding
        event = Backward(
            self.tape.next,
            one.around.place,
            index=index,
            seconds=seconds,
            turns=one.around.turns,
            path=one.around.path,
            is_gradfold=one.around.is_gradfold,
            terms=one.terms,
            census=one.census,
            fetches=feeding.num_fetches,
            loader=feeding.loader,
            pass_number=feeding.pass_number,
            rows=_micro_rows(feeding.rows, one.terms),
            fetched_rows=feeding.rows,
            touched=tuple(ledger.number for ledger in touched),
            keeps_graph=one.keeps_graph,
            is_scaled=one.is_scaled,
            is_hooked=any(ledger.has_hooks() for ledger in touched),
            dtypes=frozenset(dtype for ledger in touched for dtype in ledger.dtypes()),
            syncs=self._syncs(),
        )
        self.tape.add(event)

    def _syncs(self) -> tuple[tuple[bool, bool, int], ...]:
        found = []
        for module, prepared in self.ddp_forwards.values():
            size = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
            found.append((prepared, bool(getattr(module, "require_backward_grad_sync", True)), size))
        self.ddp_forwards = {}
        return tuple(found)

    # Steps

    def step_begins(self, optimizer: Optimizer) -> None:
        """An optimizer's step begins; steps inside it are its own."""
        ledger = self.ledger_of(optimizer)
        if not self._steps:
            self.settle()
            self._step_start_s = time.perf_counter()
        self._steps.append((ledger, len(self.tape.backwards)))
        if len(self._steps) == 1:
            self._found = tuple(ledger.entries), ledger.stepped, ledger.what_a_step_finds()

    def step_ends(self, optimizer: Optimizer) -> None:
        """It ends."""
        if not self._steps:
            return
        ledger, first = self._steps.pop()
        if self._steps or ledger.optimizer() is not optimizer:
            return
        seconds = time.perf_counter() - self._step_start_s
        has_closure = len(self.tape.backwards) > first
        entries, num_stale, gradients = self._found
        if has_closure:
            entries, num_stale, gradients = tuple(ledger.entries), ledger.stepped, ledger.what_a_step_finds()
        elif gradients == "new" and not ledger.parameters_moved():
            return  # an optimizer that counts micro-batches by itself, and has not come to its update
        event = Step(
            self.tape.next,
            self.map.here(),
            ledger=ledger.number,
            optimizer=type(optimizer).__name__,
            seconds=seconds,
            entries=entries,
            num_stale=num_stale,
            ratio=ledger.ratio,
            is_rewritten=ledger.is_rewritten or (entries != tuple(ledger.entries)),
            gradients=gradients,
            through_scaler=self.num_scaler_steps > 0,
            has_closure=has_closure,
            rounding=self._precise.error(ledger.number),
        )
        self.tape.add(event)
        for one in self.ledgers:  # those that share parameters with this one have been served, too
            one.remember_parameters()
            if one.shares_with(ledger):
                one.stepped = len(one.entries)
        ledger.remember()
        self.stop.note_step(ledger.number)
        if self.stretch is None:
            self.stretch = self.tape.next, time.perf_counter(), self.cost_s


def _micro_rows(fetched: int, terms: tuple[Term, ...]) -> int:
    """Of a micro-batch: of the batch that was fetched, or of the part of it that the loss is over."""
    known = [rows for rows in (fetched, *(term.rows for term in terms)) if rows]
    return min(known, default=0)
