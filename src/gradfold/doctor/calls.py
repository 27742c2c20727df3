"""The calls around gradients: clipping, loss scaling, schedules, reads by the host, and DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradfold.doctor.events import Clip, Read, Scaler, Tick
from gradfold.doctor.guard import Look
from gradfold.doctor.ledger import Ledger
from gradfold.doctor.place import Place
from gradfold.doctor.watch import Watch

__all__: list[str] = []


class Calls:
    """Writes down the calls that go with a watch's backward passes and steps."""

    def __init__(self, watch: Watch) -> None:
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
        ledger: Ledger | None = watch.ledger_of(optimizer) if isinstance(optimizer, Optimizer) else None
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
        watch.tape.add(Tick(watch.tape.next, watch.map.here(), number, name, ledger, horizon, before, after))

    def read(self, place: Place, call: str, tensor: Tensor, seconds: float) -> None:
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
