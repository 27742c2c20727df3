"""The backward passes of a script: each with its loss, its graph, its batch, and the gradients that it left."""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from gradfold.doctor import census as graph
from gradfold.doctor.events import Backward
from gradfold.doctor.guard import Look
from gradfold.doctor.ledger import Ledger, State
from gradfold.doctor.loss_graph import Term, mark_of, terms_of
from gradfold.doctor.place import Place, Surroundings
from gradfold.doctor.watch import Watch

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
    before: list[tuple[Ledger, list[State]]]
    start_s: float


class BackwardPasses:
    """Writes each one down on a watch's tape."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._censuses: dict[Place, int] = {}

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

    def _census(self, place: Place, losses: list[Tensor]) -> graph.Census | None:
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


def _terms(losses: list[Tensor], seeds: list[Tensor | None]) -> tuple[Term, ...]:
    try:
        return tuple(term for loss, seed in zip(losses, seeds, strict=True) for term in terms_of(loss, seed))
    except (RuntimeError, AttributeError, TypeError, ValueError):  # a graph that is gone, or arguments torch refuses
        return (Term("nothing", "unknown"),)


def _micro_rows(fetched: int, terms: tuple[Term, ...]) -> int:
    """Of a micro-batch: of the batch that was fetched, or of the part of it that the loss is over."""
    known = [rows for rows in (fetched, *(term.rows for term in terms)) if rows]
    return min(known, default=0)
