"""The backward passes of a script: each with its loss, its graph, its batch, and the gradients that it left.

The calls around gradients: clipping, loss scaling, schedules, reads by the host, and DistributedDataParallel.

The steps of a script's optimizers: each with the backward passes whose gradients it used.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradfold.doctor import graph_stats as graph
from gradfold.doctor.events import Backward, Clip, Read, Scaler, SchedulerStep, Step
from gradfold.doctor.gradient_state import GradientProvenance, State
from gradfold.doctor.instrumentation import Look
from gradfold.doctor.loss_graph import DividedTerm, mark_of, terms_of
from gradfold.doctor.recorder import Recorder
from gradfold.doctor.source import CallContext, SourceLocation

__all__: list[str] = []

_MOST_CENSUSES = 48  # of the graphs of backward passes from one line


@dataclass
class _OpenPass:
    """What is known while a backward pass runs."""

    around: CallContext
    terms: tuple[DividedTerm, ...]
    census: graph.GraphStats | None
    is_scaled: bool
    keeps_graph: bool
    before: list[tuple[GradientProvenance, list[State]]]
    start_s: float


class BackwardPasses:
    """Writes each one down on a watch's tape."""

    def __init__(self, watch: Recorder) -> None:
        self._watch = watch
        self._censuses: dict[SourceLocation, int] = {}

    def look(self, losses: list[Tensor], seeds: list[Tensor | None], keeps_graph: bool) -> Look:
        """At a backward pass; raises where enough was seen."""
        watch, start_s = self._watch, time.perf_counter()
        watch.stop.check(watch.tape)
        with watch.quietly():
            watch.settle()
            watch.precise_sums.prepare(watch.ledgers)
            around = watch.map.around()
            one = _OpenPass(
                around,
                _terms(losses, seeds),
                self._census(around.place, losses),
                any(mark_of(loss) == "scaled" for loss in losses),
                keeps_graph,
                [(ledger, ledger.states()) for ledger in watch.ledgers],
                time.perf_counter(),
            )
            watch.stopwatch.take_off(one.start_s - start_s)
            outcome = yield None
            end_s = time.perf_counter()
            if outcome.error is None:
                self._note(one, end_s - one.start_s)
            watch.stopwatch.take_off(time.perf_counter() - end_s)

    def _census(self, place: SourceLocation, losses: list[Tensor]) -> graph.GraphStats | None:
        count = self._censuses.get(place, 0)
        if count >= _MOST_CENSUSES or len(losses) != 1 or losses[0].grad_fn is None:
            return None
        self._censuses[place] = count + 1
        try:
            return graph.take(losses[0], may_read=not self._watch.has_saved_hooks)
        except (RuntimeError, AttributeError, TypeError):  # a node of an extension's, or one whose tensors are gone
            return None

    def _note(self, one: _OpenPass, seconds: float) -> None:
        watch, index = self._watch, len(self._watch.tape.backwards)
        touched = [ledger for ledger, before in one.before if ledger.states() != before]
        for ledger in touched:
            ledger.entries.append(index)
            ledger.remember()
            ledger.remember_parameters()
        if one.census is not None:
            watch.strays.note(one.census.leaves, watch.known(), index)
            one.census.leaves = []
        feeding = watch.feeding
        event = Backward(
            watch.tape.next,
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
        watch.tape.add(event)

    def _syncs(self) -> tuple[tuple[bool, bool, int], ...]:
        found = []
        for module, prepared in self._watch.ddp_forwards.values():
            size = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
            found.append((prepared, bool(getattr(module, "require_backward_grad_sync", True)), size))
        self._watch.ddp_forwards = {}
        return tuple(found)


def _terms(losses: list[Tensor], seeds: list[Tensor | None]) -> tuple[DividedTerm, ...]:
    try:
        return tuple(term for loss, seed in zip(losses, seeds, strict=True) for term in terms_of(loss, seed))
    except (RuntimeError, AttributeError, TypeError, ValueError):  # a graph that is gone, or arguments torch refuses
        return (DividedTerm("nothing", "unknown"),)


def _micro_rows(fetched: int, terms: tuple[DividedTerm, ...]) -> int:
    """Of a micro-batch: of the batch that was fetched, or of the part of it that the loss is over."""
    known = [rows for rows in (fetched, *(term.rows for term in terms)) if rows]
    return min(known, default=0)


class Calls:
    """Writes down the calls that go with a watch's backward passes and steps."""

    def __init__(self, watch: Recorder) -> None:
        self._watch = watch
        self._numbers: dict[int, int] = {}  # of scalers and schedulers, by id

    def clipping(
        self, parameters: Iterable[Tensor], kind: str, limit: float, instead: tuple[tuple[Any, ...], dict[str, Any]]
    ) -> Look:
        """At a call that clips.

        Args:
            parameters: whose gradients; read when the call has ended.
            kind: "norm" or "value".
            limit: the largest allowed.
            instead: what to call it with.
        """
        watch = self._watch
        if watch.is_quiet:
            yield instead
            return
        with watch.quietly():
            watch.settle()
            entries = watch.standing()
            scaled = frozenset(number for number, passes in entries.items() if self._are_scaled(number, passes))
            outcome = yield instead
            if outcome.error is not None:
                return
            for ledger in watch.ledgers:
                ledger.remember()
            owning = self._owners(parameters)
            clipped = {number: passes for number, passes in entries.items() if number in owning}
            tape = watch.tape
            tape.add(Clip(tape.next, watch.map.here(), kind, limit, outcome.result, clipped, scaled & owning))

    def _owners(self, parameters: Iterable[Tensor]) -> set[int]:
        ids = {id(one) for one in parameters}
        return {one.number for one in self._watch.ledgers if any(id(p) in ids for p in one.watched())}

    def _are_scaled(self, ledger: int, entries: tuple[int, ...]) -> bool:
        watch = self._watch
        return ledger not in watch.unscaled and any(watch.tape.backwards[index].is_scaled for index in entries)

    def scaler(self, scaler: Any, call: str, optimizer: Any) -> Look | None:
        """At `unscale_`, `step` or `update` of a GradScaler."""
        return None if self._watch.is_quiet or not scaler.is_enabled() else self._scaling(scaler, call, optimizer)

    def _scaling(self, scaler: Any, call: str, optimizer: Any) -> Look:
        watch = self._watch
        watch.settle()
        ledger: GradientProvenance | None = watch.ledger_of(optimizer) if isinstance(optimizer, Optimizer) else None
        entries, place = watch.standing(None if ledger is None else [ledger]), watch.map.here()
        if ledger is not None:
            entries.setdefault(ledger.number, ())
        watch.num_scaler_steps += call == "step"
        outcome = yield None
        watch.num_scaler_steps -= call == "step"
        error = "" if outcome.error is None else str(outcome.error)
        watch.tape.add(Scaler(watch.tape.next, place, call, self._number(scaler), entries, error))
        if call == "unscale_" and ledger is not None and not error:
            watch.unscaled.add(ledger.number)
            ledger.remember()

    def tick(self, scheduler: Any, before: float) -> None:
        """A scheduler made a step."""
        watch, optimizer = self._watch, getattr(scheduler, "optimizer", None)
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner  # what a framework has wrapped
        ledger = watch.ledger_of(optimizer).number if isinstance(optimizer, Optimizer) else None
        lengths = [getattr(scheduler, name, None) for name in ("T_max", "total_steps")]
        horizon = next((length for length in lengths if isinstance(length, int)), None)
        number, name = self._number(scheduler), type(scheduler).__name__
        after = learning_rate(optimizer)
        watch.tape.add(SchedulerStep(watch.tape.next, watch.map.here(), number, name, ledger, horizon, before, after))

    def read(self, place: SourceLocation, call: str, tensor: Tensor, seconds: float) -> None:
        """The host read what was computed."""
        tape = self._watch.tape
        tape.add(Read(tape.next, place, call, seconds, len(tape.backwards), tensor.device.type))

    def ddp_forward(self, module: nn.Module) -> None:
        """A DistributedDataParallel runs forward."""
        if torch.is_grad_enabled():
            prepares = bool(getattr(module, "require_backward_grad_sync", True))
            self._watch.ddp_forwards[id(module)] = module, prepares

    def _number(self, thing: Any) -> int:
        return self._numbers.setdefault(id(thing), len(self._numbers))


def learning_rate(optimizer: Any) -> float:
    """Of an optimizer's first group; 0 for what is no optimizer."""
    return float(optimizer.param_groups[0]["lr"]) if isinstance(optimizer, Optimizer) else 0.0


@dataclass(frozen=True)
class _Found:
    """What stands in `.grad` when a step begins; the words are those of `Step`."""

    entries: tuple[int, ...]
    num_stale: int
    gradients: str


def _what_stands(ledger: GradientProvenance) -> _Found:
    return _Found(tuple(ledger.entries), ledger.stepped, ledger.what_a_step_finds())


class Steps:
    """Writes each one down on a watch's tape; steps inside a step are its own."""

    def __init__(self, watch: Recorder) -> None:
        self._watch = watch
        self._open: list[tuple[GradientProvenance, int]] = []  # and how many backward passes there were when they began
        self._start_s = 0.0
        self._found = _Found((), 0, "none")

    def begin(self, optimizer: Optimizer, *_arguments: Any) -> None:
        """An optimizer's step begins."""
        watch = self._watch
        ledger = watch.ledger_of(optimizer)
        same = [index for index, (one, _) in enumerate(self._open) if one is ledger]
        del self._open[same[0] if same else len(self._open) :]  # a step that raised has no end
        if not self._open:
            watch.settle()
            self._start_s = time.perf_counter()
        self._open.append((ledger, len(watch.tape.backwards)))
        watch.num_open_steps = len(self._open)
        if len(self._open) == 1:
            self._found = _what_stands(ledger)

    def end(self, optimizer: Optimizer, *_arguments: Any) -> None:
        """It ends."""
        if not self._open:
            return
        watch = self._watch
        ledger, first = self._open.pop()
        watch.num_open_steps = len(self._open)
        if self._open or ledger.optimizer() is not optimizer:
            return
        seconds = time.perf_counter() - self._start_s
        has_closure = len(watch.tape.backwards) > first
        found = _what_stands(ledger) if has_closure else self._found
        if not has_closure and found.gradients == "new" and not ledger.parameters_moved():
            return  # an optimizer that counts micro-batches by itself, and has not come to its update
        event = Step(
            watch.tape.next,
            watch.map.here(),
            ledger=ledger.number,
            optimizer=type(optimizer).__name__,
            seconds=seconds,
            entries=found.entries,
            num_stale=found.num_stale,
            ratio=ledger.ratio,
            is_rewritten=ledger.is_rewritten or (found.entries != tuple(ledger.entries)),
            gradients=found.gradients,
            through_scaler=watch.num_scaler_steps > 0,
            has_closure=has_closure,
            rounding=watch.precise_sums.error(ledger.number),
        )
        watch.tape.add(event)
        for one in watch.ledgers:  # those that share parameters with this one have been served, too
            one.remember_parameters()
            if one.shares_with(ledger):
                one.stepped = len(one.entries)
        ledger.remember()
        watch.stop.note_step(ledger.number)
        watch.stopwatch.start(watch.tape.next)
