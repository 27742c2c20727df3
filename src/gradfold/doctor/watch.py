"""A watch over a training script: what each call does to the gradients, written down as events."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradfold.doctor import census as graph
from gradfold.doctor.events import Backward, Clear, Clip, Fetch, Pass, Read, Scaler, Step, Tape, Tick
from gradfold.doctor.ledger import Ledger
from gradfold.doctor.loss_graph import MARK, Term, terms_of
from gradfold.doctor.place import Map, Place, Surroundings
from gradfold.doctor.precise_sum import PreciseSums
from gradfold.doctor.stop import Stop
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
    before: list[tuple[Ledger, list[Any]]]
    start_s: float


class Watch:
    """Keeps the ledgers of all optimizers and the tape of events.

    Args:
        script: the file that runs; its folder is the user's.
        stop: decides when enough was seen.
    """

    def __init__(self, script: Path, stop: Stop) -> None:
        self.map = Map(script)
        self.tape = Tape()
        self.stop = stop
        self.ledgers: list[Ledger] = []
        self.strays: dict[int, Tensor] = {}  # parameters in no optimizer, kept so that ids stay theirs
        self._stray_values: dict[int, Tensor] = {}
        self.stray_grads: dict[int, list[int]] = {}  # ... and the backward passes that gave them gradients
        self.models: list[weakref.ref[nn.Module]] = []
        self.precise = PreciseSums()
        self.is_quiet = 0  # inside the doctor's own work or a nested call
        self.has_saved_hooks = False
        self.precisions: set[str] = set()
        self._steps: list[tuple[Ledger, int]] = []
        self._in_scaler = 0
        self._censuses: dict[Place, int] = {}
        self._loaders: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._passes: dict[int, int] = {}
        self._current: dict[int, int] = {}
        self._last_fetch: tuple[int | None, int] = (None, 0)
        self._num_fetches = 0
        self._ids: dict[int, int] = {}
        self._unscaled: set[int] = set()
        self._ddp_forwards: dict[int, tuple[nn.Module, bool]] = {}
        self.cost_s = 0.0
        self.first_s: float | None = None  # when the first batch was fetched or the first backward pass began
        self.module: ModuleType | None = None  # the script, kept alive for who asks it for names

    # Optimizers

    def add_optimizer(self, optimizer: Optimizer) -> Ledger:
        """Open a ledger for an optimizer, or find it."""
        for ledger in self.ledgers:
            if ledger.optimizer() is optimizer:
                return ledger
        ledger = Ledger(weakref.ref(optimizer), len(self.ledgers))
        self.ledgers.append(ledger)
        watched = ledger.watched()
        have = [one for one in watched if one.grad is not None]
        ledger.entries = sorted({entry for one in have for entry in self.stray_grads.get(id(one), [])})
        ledger.remember()
        ledger.remember_parameters()
        return ledger

    def settle(self, place: Place | None = None) -> None:
        """See what the user's own code did to gradients since the last event."""
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
        self._unscaled.discard(ledger.number)
        self.precise.empty(ledger.number)

    # Backward passes

    @contextmanager
    def backward(self, losses: list[Tensor], seeds: list[Tensor | None], keeps_graph: bool) -> Iterator[None]:
        """Around a backward pass."""
        start = time.perf_counter()
        self.first_s = self.first_s or start
        self.is_quiet += 1
        self.stop.check(self)
        self.settle()
        before = [(ledger, ledger.states()) for ledger in self.ledgers]
        around = self.map.around()
        terms = tuple(term for loss, seed in zip(losses, seeds, strict=True) for term in terms_of(loss, seed))
        scaled = any(_is_scaled(loss) for loss in losses)
        open_pass = _OpenPass(around, terms, self._census(around.place, losses), scaled, before, time.perf_counter())
        self.precise.prepare(self.ledgers)
        self.cost_s += open_pass.start_s - start
        try:
            yield
        except BaseException:
            self.is_quiet -= 1
            raise
        end = time.perf_counter()
        self._note_backward(open_pass, end - open_pass.start_s, keeps_graph)
        self.is_quiet -= 1
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

    def _note_backward(self, one: _OpenPass, seconds: float, keeps_graph: bool) -> None:
        index = len(self.tape.backwards)
        touched = []
        dtypes: set[str] = set()
        for ledger, before in one.before:
            after = ledger.states()
            if after != before:
                touched.append(ledger.number)
                ledger.entries.append(index)
                dtypes |= {str(p.grad.dtype).removeprefix("torch.") for p in ledger.watched() if p.grad is not None}
                ledger.remember()
                ledger.remember_parameters()
        if one.census is not None:
            self._note_strays(one.census, index)
        loader, number = self._last_fetch
        self.tape.add(
            Backward(
                self.tape.next,
                one.around.place,
                index,
                seconds,
                one.around.turns,
                one.around.is_gradfold,
                one.terms,
                one.census,
                self._num_fetches,
                loader,
                self._passes.get(loader, 0) if loader is not None else 0,
                _micro_rows(number if loader is not None else 0, one.terms),
                tuple(touched),
                keeps_graph,
                one.is_scaled,
                frozenset(dtypes),
                self._syncs(),
            )
        )

    def _note_strays(self, census: graph.Census, index: int) -> None:
        known = {id(p) for ledger in self.ledgers for p in _parameters(ledger)}
        for leaf in census.leaves:
            if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
                if id(leaf) not in self.strays:
                    self.strays[id(leaf)] = leaf
                    self._stray_values[id(leaf)] = leaf.detach().flatten()[:16].clone()
                self.stray_grads.setdefault(id(leaf), []).append(index)
        census.leaves = []

    def moved(self, stray: Tensor) -> bool:
        """Whether a parameter in no optimizer changed all the same: by hand."""
        return not torch.equal(stray.detach().flatten()[:16], self._stray_values[id(stray)])

    def _syncs(self) -> tuple[tuple[bool, bool, int], ...]:
        found = []
        for module, prepared in self._ddp_forwards.values():
            size = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
            found.append((prepared, bool(getattr(module, "require_backward_grad_sync", True)), size))
        self._ddp_forwards = {}
        return tuple(found)

    def ddp_forward(self, module: nn.Module) -> None:
        """A DistributedDataParallel runs forward."""
        if torch.is_grad_enabled():
            self._ddp_forwards[id(module)] = (module, bool(getattr(module, "require_backward_grad_sync", True)))

    # Steps

    @contextmanager
    def zeroing(self) -> Iterator[None]:
        """Around a call that zeroes gradients."""
        if self.is_quiet:
            yield
            return
        self.is_quiet += 1
        try:
            self.settle()
            yield
            self.settle(self.map.here())
        finally:
            self.is_quiet -= 1

    def step_begins(self, optimizer: Optimizer) -> None:
        """An optimizer's step begins; steps inside it are its own."""
        ledger = self.add_optimizer(optimizer)
        if not self._steps:
            self.settle()
        self._steps.append((ledger, len(self.tape.backwards)))
        self._step_start_s = time.perf_counter()

    def step_ends(self, optimizer: Optimizer) -> None:
        """It ends."""
        if not self._steps:
            return
        ledger, first = self._steps.pop()
        if self._steps or ledger.optimizer() is not optimizer:
            return
        seconds = time.perf_counter() - self._step_start_s
        fresh = len(ledger.entries) - ledger.stepped
        self.tape.add(
            Step(
                self.tape.next,
                self.map.here(),
                ledger.number,
                type(optimizer).__name__,
                seconds,
                tuple(ledger.entries),
                ledger.stepped,
                ledger.ratio,
                ledger.is_rewritten,
                self._gradients(ledger, fresh),
                self._in_scaler > 0,
                len(self.tape.backwards) > first,
                self.precise.error(ledger.number),
            )
        )
        for one in self.ledgers:
            if one is not ledger:
                one.remember_parameters()
        ledger.stepped = len(ledger.entries)
        ledger.remember()
        ledger.remember_parameters()
        self.stop.note_step(ledger.number)

    def _gradients(self, ledger: Ledger, fresh: int) -> str:
        grads = [p.grad for p in ledger.watched() if p.grad is not None]
        if not grads:
            return "none"
        if fresh or ledger.is_rewritten:
            return "new"
        if all(grad.layout == torch.strided and not bool(grad.any()) for grad in grads):
            return "zero"
        return "stale" if ledger.entries else "new"

    def standing(self, ledgers: list[Ledger] | None = None) -> dict[int, tuple[int, ...]]:
        """By optimizer's number, the backward passes in `.grad` that no step has used."""
        chosen = self.ledgers if ledgers is None else ledgers
        return {one.number: tuple(one.entries[one.stepped :]) for one in chosen if one.entries[one.stepped :]}

    # Clipping, scaling, schedules

    @contextmanager
    def clipping(self, parameters: Any, kind: str, limit: float) -> Iterator[dict[str, Any]]:
        """Around a call that clips; its result is put into the dict."""
        result: dict[str, Any] = {}
        if self.is_quiet:
            yield result
            return
        self.is_quiet += 1
        try:
            self.settle()
            entries = self.standing(self._owning(parameters))
            scaled = frozenset(
                number
                for number, indices in entries.items()
                if number not in self._unscaled and any(self.tape.backwards[index].is_scaled for index in indices)
            )
            yield result
            for ledger in self.ledgers:
                ledger.remember()
            norm = result.get("norm")
            self.tape.add(Clip(self.tape.next, self.map.here(), kind, limit, norm, entries, scaled))
        finally:
            self.is_quiet -= 1

    def _owning(self, parameters: Any) -> list[Ledger]:
        ids = {id(one) for one in parameters}
        return [one for one in self.ledgers if any(id(p) in ids for p in one.watched())]

    @contextmanager
    def scaler_call(self, scaler: Any, call: str, optimizer: Any) -> Iterator[None]:
        """Around `unscale_`, `step` or `update` of a GradScaler."""
        if self.is_quiet or not scaler.is_enabled():
            yield
            return
        self.settle()
        ledgers = [self.add_optimizer(optimizer)] if isinstance(optimizer, Optimizer) else None
        entries, place, error = self.standing(ledgers), self.map.here(), ""
        if ledgers is not None and not entries:
            entries = {ledgers[0].number: ()}
        self._in_scaler += call == "step"
        try:
            yield
        except (RuntimeError, AssertionError, ValueError) as raised:
            error = str(raised)
            raise
        finally:
            self._in_scaler -= call == "step"
            self.tape.add(Scaler(self.tape.next, place, call, self._id(scaler), entries, error))
            if call == "unscale_" and ledgers is not None and not error:
                self._unscaled.add(ledgers[0].number)
                ledgers[0].remember()

    def tick(self, scheduler: Any, place: Place, before: float) -> None:
        """A scheduler made a step."""
        optimizer = getattr(scheduler, "optimizer", None)
        ledger = self.add_optimizer(optimizer).number if isinstance(optimizer, Optimizer) else None
        horizon = next((h for name in ("T_max", "total_steps") if isinstance(h := getattr(scheduler, name, None), int)), 0)
        after = _learning_rate(optimizer)
        name = type(scheduler).__name__
        self.tape.add(Tick(self.tape.next, place, self._id(scheduler), name, ledger, horizon or None, before, after))

    def _id(self, thing: Any) -> int:
        return self._ids.setdefault(id(thing), len(self._ids))

    # Loaders and the host

    def pass_begins(self, loader: Any) -> int:
        """An iteration over a loader begins: its number among loaders."""
        self.first_s = self.first_s or time.perf_counter()
        number = self._loaders.setdefault(loader, len(self._loaders))
        self._passes[number] = self._passes.get(number, 0) + 1
        self._current[number] = 0
        try:
            length: int | None = len(loader)
        except (TypeError, NotImplementedError):
            length = None
        self.tape.add(Pass(self.tape.next, self.map.here(), number, length))
        self.stop.note_pass(number, length)
        return number

    def fetched(self, loader: int, batch: Any, seconds: float) -> None:
        """A loader gave a batch; None where its pass has ended."""
        rows = 0 if batch is None else _rows(batch)
        number = -1
        if batch is not None:
            number = self._current[loader]
            self._current[loader] += 1
            self._num_fetches += 1
            self._last_fetch = (loader, rows)
        self.tape.add(Fetch(self.tape.next, self.map.here(), loader, number, rows, seconds))

    def read(self, place: Place, call: str, tensor: Tensor, seconds: float, is_result: bool) -> None:
        """The host read a tensor."""
        number = len(self.tape.backwards)
        device = tensor.device.type
        self.tape.add(Read(self.tape.next, place, call, seconds, number, device, is_result))


def _parameters(ledger: Ledger) -> list[Tensor]:
    optimizer = ledger.optimizer()
    return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


def _is_scaled(loss: Tensor) -> bool:
    return loss.grad_fn is not None and loss.grad_fn.metadata.get(MARK) == "scaled"


def _learning_rate(optimizer: Any) -> float:
    return float(optimizer.param_groups[0]["lr"]) if isinstance(optimizer, Optimizer) else 0.0


def _micro_rows(fetched: int, terms: tuple[Term, ...]) -> int:
    """Of a micro-batch: of the batch that was fetched, or of the part of it that the loss is over."""
    known = [rows for rows in (fetched, *(term.rows for term in terms)) if rows]
    return min(known, default=0)


def _rows(batch: Any, depth: int = 0) -> int:
    """Of the first tensor in a batch of any nesting."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    if depth > 3:
        return 0
    values = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, (list, tuple)) else ()
    return next((rows for value in list(values)[:8] if (rows := _rows(value, depth + 1))), 0)
