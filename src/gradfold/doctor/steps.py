"""The steps of a script's optimizers: each with the backward passes whose gradients it used."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from gradfold.doctor.events import Step
from gradfold.doctor.ledger import Ledger
from gradfold.doctor.watch import Watch

__all__: list[str] = []


@dataclass(frozen=True)
class _Found:
    """What stands in `.grad` when a step begins; the words are those of `Step`."""

    entries: tuple[int, ...]
    num_stale: int
    gradients: str


def _what_stands(ledger: Ledger) -> _Found:
    return _Found(tuple(ledger.entries), ledger.stepped, ledger.what_a_step_finds())


class Steps:
    """Writes each one down on a watch's tape; steps inside a step are its own."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._open: list[tuple[Ledger, int]] = []  # and how many backward passes there were when they began
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
