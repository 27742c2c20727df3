"""The hooks on backward passes: each with its loss, its graph, its batch and the gradients that it left."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradfold.doctor.events import Backward, DdpSync
from gradfold.doctor.gradient_state import GradientProvenance
from gradfold.doctor.graph_stats import GraphStats, graph_stats
from gradfold.doctor.instrumentation import Hook, Patches
from gradfold.doctor.recorder import Recorder
from gradfold.doctor.source import SourceLocation
from gradfold.doctor.torch_private import engine_run_backward
from gradfold.engine.loss_graph import DividedTerm, mark, mark_of, number, terms_of

_MOST_WALKS = 48  # through the graphs of backward passes from one line


class BackwardHooks:
    """Records backward passes."""

    def __init__(self, recorder: Recorder, patches: Patches) -> None:
        self._recorder = recorder
        self._num_walks: Counter[SourceLocation] = Counter()
        self._ddp_forwards: dict[nn.Module, bool] = {}  # whether each prepared a reduction since the last backward pass
        self._has_saved_hooks = False  # whether saved tensors are packed by hooks
        patches.hook(Tensor, "backward", self._at_backward)
        patches.hook(torch.autograd, "backward", self._at_backward)
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("gradfold.") and not module_name.startswith("gradfold.doctor."):
                for name, value in list(vars(module).items()):
                    if value is engine_run_backward:
                        patches.hook(module, name, self._at_backward)
        patches.hook(nn.functional, "cross_entropy", _at_cross_entropy)
        patches.hook(DistributedDataParallel, "forward", self._at_ddp_forward)
        patches.hook(torch.autograd.graph.saved_tensors_hooks, "__enter__", self._at_saved_hooks)

    def _at_backward(
        self, tensors: Any, grad_tensors: Any = None, retain_graph: Any = None, *_args: Any, **options: Any
    ) -> Hook:
        """Record a backward pass; raises where enough was seen."""
        recorder, begin_s = self._recorder, time.perf_counter()
        if recorder.is_paused:
            return
        recorder.stop.check(recorder.log)
        losses, grad_tensors = as_list(tensors), options.get("gradient", grad_tensors)
        grad_outputs = [None] * len(losses) if grad_tensors is None else as_list(grad_tensors)
        with recorder.paused():
            recorder.detect_changes()
            recorder.precise_sums.start(recorder.provenances)
            location = recorder.source.here()
            terms, graph = _terms(losses, grad_outputs), self._graph_stats(location, losses)
            context = recorder.source.context()
            is_scaled = any(mark_of(loss) == "scaled" for loss in losses)
            before = [(provenance, provenance.versions()) for provenance in recorder.provenances]
            start_s = time.perf_counter()
            recorder.stopwatch.own_s += start_s - begin_s
            outcome = yield None
            end_s = time.perf_counter()
            if outcome.error is None:
                changed = [provenance for provenance, versions in before if provenance.versions() != versions]
                self._update_provenance(changed, graph)
                sizes = (recorder.loader_state.rows, *(term.rows for term in terms))  # of the batch, or a part of it
                recorder.log.add(
                    Backward,
                    location,
                    index=len(recorder.log.backwards),
                    seconds=end_s - start_s,
                    context=context,
                    terms=terms,
                    graph=graph,
                    loader_state=recorder.loader_state,
                    rows=min(filter(None, sizes), default=0),
                    optimizers=tuple(provenance.number for provenance in changed),
                    retains_graph=bool(retain_graph),
                    is_scaled=is_scaled,
                    has_hooks=any(provenance.has_hooks() for provenance in changed),
                    dtypes=frozenset(dtype for provenance in changed for dtype in provenance.dtypes()),
                    ddp=self._ddp_syncs(),
                )
            recorder.stopwatch.own_s += time.perf_counter() - end_s

    def _graph_stats(self, location: SourceLocation, losses: list[Tensor]) -> GraphStats:
        if self._num_walks[location] >= _MOST_WALKS or len(losses) != 1 or losses[0].grad_fn is None:
            return GraphStats()
        self._num_walks[location] += 1
        try:
            return graph_stats(losses[0], may_read=not self._has_saved_hooks)
        except (RuntimeError, AttributeError, TypeError):  # a node of an extension's, or one whose tensors are freed
            return GraphStats()

    def _update_provenance(self, changed: list[GradientProvenance], graph: GraphStats) -> None:
        recorder, index = self._recorder, len(self._recorder.log.backwards)
        for provenance in changed:
            provenance.backwards.append(index)
            provenance.remember()
            provenance.remember_parameters()
        if graph.leaves:
            recorder.unoptimized.record(graph.leaves, recorder.optimized_ids(), index)
            graph.leaves = []

    def _at_ddp_forward(self, module: nn.Module, *_args: Any, **_options: Any) -> Hook:
        if torch.is_grad_enabled():
            self._ddp_forwards[module] = _is_sync_on(module)
        yield None

    def _ddp_syncs(self) -> tuple[DdpSync, ...]:
        forwards, self._ddp_forwards = self._ddp_forwards, {}
        sizes = [sum(p.numel() * p.element_size() for p in one.parameters() if p.requires_grad) for one in forwards]
        pairs = zip(forwards.items(), sizes, strict=True)
        return tuple(DdpSync(was_on, _is_sync_on(module), num_bytes) for (module, was_on), num_bytes in pairs)

    def _at_saved_hooks(self, *_args: Any) -> Hook:
        self._has_saved_hooks = True
        yield None


def as_list(value: Any) -> list[Any]:
    """One tensor, None, or several, as torch's functions accept them."""
    return [value] if isinstance(value, Tensor) or value is None else list(value)


def _is_sync_on(module: nn.Module) -> bool:
    return bool(getattr(module, "require_backward_grad_sync", True))


def _terms(losses: list[Tensor], grad_outputs: list[Tensor | None]) -> tuple[DividedTerm, ...]:
    try:
        return tuple(term for pair in zip(losses, grad_outputs, strict=True) for term in terms_of(*pair))
    except (RuntimeError, AttributeError, TypeError, ValueError):  # a graph that is freed, or arguments torch rejects
        return (DividedTerm("nothing", "unknown"),)


def _at_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Hook:
    """Marks what the graph of cross_entropy does not show: label smoothing, and probabilities as targets."""
    outcome = yield None
    loss, has_probabilities = outcome.result, isinstance(target, Tensor) and target.is_floating_point()
    if outcome.error is not None or loss.grad_fn is None or reduction not in ("mean", "sum"):
        return
    if has_probabilities or label_smoothing:
        rows = len(target)
        size, count = (rows, rows) if has_probabilities else (target.numel(), number((target != ignore_index).sum()))
        mark(loss, DividedTerm("CrossEntropy", reduction, count, size, rows, (), target))
