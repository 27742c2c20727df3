"""A program: what training on one global batch runs, a window and an update, on copies that nobody else sees.

On fake tensors (`FakeTensorMode`) it takes no memory and next to no time, and writes the same ledger as on real ones.

A replica: a copy of a model and its optimizer that nobody else sees, on real tensors or on fake ones.

Models are copied with their tensors replaced, since building or copying them under `FakeTensorMode` fails for some (a
0-d buffer, as BatchNorm has).

A rehearsal: a program whose runs leave nothing behind, neither in what its functions reach nor in caches.

A fake tensor that stays in a list, a dict or a `functools.cache` fails when something real meets it, long after.
"""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from gradfold.batch.nesting import Batch, every_leaf, map_tensors
from gradfold.distributed.fsdp import ShardingRecipe, gathered_parameters, set_reducing, sharded_modules
from gradfold.engine.backward import BackPropagation, graph_leaves
from gradfold.engine.loss_terms import LossFn, read_pair, read_terms
from gradfold.errors import DistributedError
from gradfold.memory.probe_batch import ProbeBatch, storage_bytes
from gradfold.memory.trace import AllocationTrace
from gradfold.memory.tracker import MemoryTracker, state_tensors
from gradfold.precision import Precision
from gradfold.self_check.rng_replay import OwnGenerators
from gradfold.state.external import ExternalState
from gradfold.state.gradients import GradientBuffer
from gradfold.state.rng import HostRandomState, RandomState

__all__: list[str] = []

Replica: TypeAlias = "tuple[nn.Module, torch.optim.Optimizer | None]"


def real_replica(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Replica:
    """With tensors of its own.

    Raises:
        DistributedError: the model has shards, which no rank can run alone.
    """
    if sharded_modules(list(model.modules())):
        raise DistributedError("its parameters are sharded, so that no rank can run it alone")
    return copy.deepcopy((model, optimizer))


def fake_replica(model: nn.Module, optimizer: torch.optim.Optimizer | None, mode: FakeTensorMode) -> Replica:
    """On fake tensors; with shards where the model has them, though nothing will be sent to other ranks.

    Raises:
        DistributedError: it is sharded in a way that cannot be repeated.
        Exception: whatever copying a model or an optimizer raises.
    """
    if not sharded_modules(list(model.modules())):
        memo: dict[int, Any] = {id(tensor): _fake(tensor, mode) for tensor in _tensors(model, optimizer)}
        return copy.deepcopy(model, memo), copy.deepcopy(optimizer, memo)
    sharding = ShardingRecipe(model)
    with mode:
        memo = dict(sharding.whole_parameters())
    memo |= {id(tensor): _fake(tensor, mode) for tensor in _tensors(model, optimizer) if id(tensor) not in memo}
    copied = sharding.copy(memo)
    with mode:
        memo |= sharding.apply(copied)  # which an optimizer steps
    return copied, copy.deepcopy(optimizer, memo)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Every tensor that a copy of model and optimizer would copy."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        found += [leaf for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
    if optimizer is not None:
        found += [one for group in optimizer.param_groups for one in group["params"]]
        found += state_tensors(optimizer)
    return found


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake of a tensor; of a number on the host one that keeps its value, since optimizers read their counts."""
    if tensor.dim() or not tensor.is_cpu or isinstance(tensor, nn.Parameter):
        return mode.from_tensor(tensor)
    value = tensor.item()
    with mode:
        return torch.tensor(value, dtype=tensor.dtype)


def leave_as_it_is(model: nn.Module) -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Program:
    """A window and an update.

    Args:
        model: stays as it is.
        loss_fn: as for `Accumulator`.
        specimen: gives the micro-batches.
        optimizer: stays as it is; None leaves the update out.
        precision: as for `Accumulator`, read.
        prepare: changes the copy of the model before it is run.
        around: a context for forward and backward passes.
        reduces_once: sum gradients of shards over ranks once per window, and keep them whole until then.
        as_on_cuda: run what torch would by default on CUDA: optimizers that work on all parameters at once.
    """

    model: nn.Module
    loss_fn: LossFn
    specimen: ProbeBatch
    optimizer: torch.optim.Optimizer | None
    precision: Precision
    prepare: Callable[[nn.Module], None] = leave_as_it_is
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    reduces_once: bool = False
    as_on_cuda: bool = False

    @property
    def num_unlike(self) -> int:
        """Micro-batches after which nothing new comes: the first finds no gradient, the last one may reduce it."""
        return 3 if self.reduces_once else 2

    def buffer_bytes(self, num_micro_batches: int) -> int:
        """What a window keeps of BatchNorm: statistics as it found them, twice, and those of every micro-batch."""
        layers = [module for module in self.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        kept = [buffer.nbytes for layer in layers if layer.training for buffer in layer.buffers()]
        return sum(kept) * (2 + num_micro_batches if num_micro_batches > 1 else 1)

    def run_fake(self, size: int, num_micro_batches: int) -> AllocationTrace:
        """The ledger of a window of some micro-batches and its update, on fake tensors.

        Raises:
            Exception: whatever a model raises that cannot run on them.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        batches = [self._take(size, mode.from_tensor) for _ in range(num_micro_batches)]
        return self._run(fake_replica(self.model, self.optimizer, mode), batches, mode)

    def run_real(self, size: int, num_micro_batches: int) -> AllocationTrace:
        """The same on copies of the real ones, which takes the memory that it says.

        Raises:
            Exception: whatever the model raises, or copying it.
        """
        device = next(self.model.parameters()).device
        batches = [self._take(size, lambda tensor: tensor.to(device, copy=True)) for _ in range(num_micro_batches)]
        return self._run(real_replica(self.model, self.optimizer), batches, nullcontext())

    def _take(self, size: int, convert: Callable[[Tensor], Tensor]) -> Batch:
        return map_tensors(convert, self.specimen.take(size))

    def _run(self, replica: Replica, batches: Sequence[Batch], mode: AbstractContextManager[Any]) -> AllocationTrace:
        model, optimizer = replica
        if optimizer is not None and self.as_on_cuda:
            _work_on_all_at_once(optimizer)
        self.prepare(model)
        with _no_trace(self.model), mode:
            return self._track(model, optimizer, batches)

    def _track(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Sequence[Batch]
    ) -> AllocationTrace:
        _drop_gradients(model)
        if optimizer is not None:  # its state comes with the first update
            self._window(model, batches[:1])
            optimizer.step()
            _drop_gradients(model)
        tracker = MemoryTracker()
        tracker.know([leaf for batch in batches for leaf in every_leaf(batch) if isinstance(leaf, Tensor)], "ignored")
        tracker.know_model(model)
        if optimizer is not None:
            tracker.know_optimizer(optimizer)
        with tracker:
            metrics = self._window(model, batches)
            self._note_metrics(tracker.ledger, metrics, batches)
            metrics.clear()
            if optimizer is not None:
                optimizer.step()
        return tracker.ledger

    def _note_metrics(
        self, ledger: AllocationTrace, metrics: Sequence[Mapping[str, Tensor]], batches: Sequence[Batch]
    ) -> None:
        of_last = list(metrics[-1].values()) if metrics else []
        # On the host a window has all of its batches to the end in any case; on a device what holds on to them does.
        given = [] if self.as_on_cuda else [leaf for batch in batches for leaf in every_leaf(batch)]
        ledger.held_metrics = storage_bytes([*given, *of_last]) - storage_bytes(given)
        ledger.row_metrics = sum(one.nbytes for one in of_last if one.dim())

    def _window(self, model: nn.Module, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        parameters = list(model.parameters())
        modules = list(model.modules())
        sharded = sharded_modules(modules)
        precision = self.precision
        gradients = GradientBuffer(parameters, precision.accumulate_dtype, precision.keep_accumulate_dtype)
        run, back_propagate = precision.around(self.loss_fn), BackPropagation()
        metrics: list[dict[str, Tensor]] = []
        for index, batch in enumerate(batches):
            set_reducing(sharded, index == len(batches) - 1 or not self.reduces_once)
            with self.around():
                output = run(model, batch)
                if isinstance(output, tuple):
                    output, of_batch = read_pair(output)
                    metrics.append({name: one.detach() for name, one in of_batch.items() if isinstance(one, Tensor)})
                terms = read_terms(output)
                del output
                strangers = _set_aside_strangers([*parameters, *gathered_parameters(modules)], terms.values())
                back_propagate([(term, 1.0) for term in terms.values()])
                del terms
                for tensor, gradient in strangers:
                    tensor.grad = gradient
        gradients.settle()
        return metrics


def _set_aside_strangers(
    parameters: Sequence[nn.Parameter], terms: Iterable[Tensor]
) -> list[tuple[Tensor, Tensor | None]]:
    """What a loss trains besides the model that it is given, with the gradients that stood there.

    Raises:
        TypeError: it is real, and the model is not.
    """
    own = set(map(id, parameters))
    others = [leaf for leaf in graph_leaves(terms) if id(leaf) not in own]
    if isinstance(parameters[0], FakeTensor):
        for other in others:
            if not isinstance(other, FakeTensor):
                raise TypeError(f"loss_fn trains a tensor of shape {tuple(other.shape)} that is not in the model")
    found = [(other, other.grad) for other in others]
    for other in others:
        other.grad = None  # else the backward pass would add to the very tensor
    return found


def _work_on_all_at_once(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    """Put back random states; and keep Python's collector from freeing when it likes, which would show in a ledger."""
    states = RandomState.record(model.parameters()), HostRandomState.record()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
        for state in states:
            state.restore()


_Wrapper: TypeAlias = "functools._lru_cache_wrapper[Any]"


def _caches() -> list[_Wrapper]:
    """The functions whose results are cached, but for torch's and our own, which keep no tensors of a model."""
    found = [one for one in gc.get_objects() if type(one) is functools._lru_cache_wrapper]
    return [one for one in found if str(getattr(one, "__module__", None)).split(".")[0] not in ("torch", "gradfold")]


@dataclass(frozen=True)
class Rehearsal(Program):
    """A `Program`; its runs put back what they change."""

    caches: list[_Wrapper] = field(default_factory=_caches, repr=False, compare=False)

    def run_fake(self, size: int, num_micro_batches: int) -> AllocationTrace:
        """As of `Program`."""
        with self._without_trace():
            return super().run_fake(size, num_micro_batches)

    def run_real(self, size: int, num_micro_batches: int) -> AllocationTrace:
        """As of `Program`."""
        with self._without_trace():
            return super().run_real(size, num_micro_batches)

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        misses = [one.cache_info().misses for one in self.caches]
        own = OwnGenerators()
        try:
            with ExternalState(self.model, self.loss_fn, self.specimen.collate), seen_by(own, self.model):
                yield
        finally:
            own.restore_generators()
            for cached, before in zip(self.caches, misses, strict=True):
                if cached.cache_info().misses != before:
                    cached.cache_clear()


def seen_by(own: OwnGenerators, model: nn.Module) -> AbstractContextManager[object]:
    """Has it see what a model runs; not so of a compiled one, which would be compiled again."""
    is_compiled = any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
    return nullcontext() if is_compiled else own
