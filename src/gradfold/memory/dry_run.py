"""A dry run: a window and an update on copies of model and optimizer, traced, with no side effect.

On fake tensors it takes no memory and next to no time, and its trace is that of a run on real ones. Models are copied
with their tensors replaced, since `FakeTensorMode` fails to copy some (a 0-d buffer, as BatchNorm has).
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gradfold.batch.nesting import Batch, every_leaf, map_tensors
from gradfold.batch.split import Collate
from gradfold.distributed.fsdp import ShardingRecipe, set_reducing, sharded_modules
from gradfold.distributed.torch_private import gathered_parameters
from gradfold.engine.backward import BackPropagation
from gradfold.engine.graph import graph_leaves
from gradfold.engine.loss_terms import LossFn, read_pair, read_terms
from gradfold.errors import DistributedError
from gradfold.memory.probe_batch import ProbeBatch
from gradfold.memory.torch_private import BatchNormBase, FakeTensor, FakeTensorMode, tree_leaves
from gradfold.memory.trace import AllocationTrace
from gradfold.memory.tracker import MemoryTracker, state_tensors, storage_bytes
from gradfold.precision import Precision
from gradfold.self_check.rng_replay import CustomGenerators
from gradfold.state.external import ExternalState
from gradfold.state.gradients import GradientBuffer

Copies: TypeAlias = "tuple[nn.Module, torch.optim.Optimizer | None]"


class Planned(Protocol):
    """What is read of an `Accumulator`, which this package cannot import."""

    model: nn.Module
    loss_fn: LossFn
    collate: Collate | None
    precision: Precision
    fsdp_reduce: Literal["per_micro_batch", "per_window"]


@dataclass(frozen=True)
class DryRun:
    """A window of an accumulator and an update."""

    model: nn.Module
    loss_fn: LossFn
    probe_batch: ProbeBatch
    optimizer: torch.optim.Optimizer | None  # None leaves the update out
    precision: Precision
    checkpointed: str | None = None  # a module list, whose modules run under activation checkpointing
    is_offloading: bool = False  # saved tensors leave the device until they are needed
    reduces_once: bool = False  # gradients of shards are reduced once per window, and stay whole until then
    as_on_cuda: bool = False  # run what torch would on CUDA: optimizers that step all parameters at once

    @classmethod
    def of(
        cls, accumulator: Planned, probe_batch: ProbeBatch, optimizer: torch.optim.Optimizer | None = None
    ) -> DryRun:
        """What an accumulator runs."""
        model, loss_fn, precision = accumulator.model, accumulator.loss_fn, accumulator.precision
        once = accumulator.fsdp_reduce == "per_window"
        return cls(model, loss_fn, probe_batch, optimizer, precision, reduces_once=once)

    @property
    def num_distinct(self) -> int:
        """Micro-batches that differ in memory: the first finds no gradient to add to, the last may reduce it."""
        return 3 if self.reduces_once else 2

    def buffer_bytes(self, num_micro_batches: int) -> int:
        """What a window keeps of BatchNorm: statistics as it found them, twice, and those of every micro-batch."""
        layers = [module for module in self.model.modules() if isinstance(module, BatchNormBase)]
        kept = [buffer.nbytes for layer in layers if layer.training for buffer in layer.buffers()]
        return sum(kept) * (2 + num_micro_batches if num_micro_batches > 1 else 1)

    def run(self, size: int, num_micro_batches: int, *, is_fake: bool) -> AllocationTrace:
        """The trace of a window and its update on fake tensors, or on real copies, which takes the memory it says."""
        mode = FakeTensorMode(allow_non_fake_inputs=True) if is_fake else None
        device = next(self.model.parameters()).device

        def convert(tensor: Tensor) -> Tensor:
            return tensor.to(device, copy=True) if mode is None else mode.from_tensor(tensor)

        with self._restored():
            batches = [map_tensors(convert, self.probe_batch.take(size)) for _ in range(num_micro_batches)]
            copies = _copy(self.model, self.optimizer, mode)
            with nullcontext() if mode is None else mode:
                return self._trace(*copies, batches)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Put back what the user's functions change; without garbage collection, which would show in the trace."""
        own, was_enabled = CustomGenerators(), gc.isenabled()
        gc.disable()
        try:
            with ExternalState(self.model, self.loss_fn, self.probe_batch.collate), watching(own, self.model):
                yield
        finally:
            own.restore_generators()
            if was_enabled:
                gc.enable()

    def _trace(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Sequence[Batch]
    ) -> AllocationTrace:
        """Run the window and the update on the copies."""
        if self.checkpointed is not None:
            for layer in model.get_submodule(self.checkpointed).children():
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        _drop(model.parameters())
        if optimizer is not None:
            for options in optimizer.param_groups if self.as_on_cuda else ():
                if options.get("foreach", False) is None and not options.get("fused"):
                    options["foreach"] = True
            self._window(model, batches[:1])  # its state comes with the first update
            optimizer.step()
            _drop(model.parameters())
        inputs = [leaf for batch in batches for leaf in every_leaf(batch) if isinstance(leaf, Tensor)]
        tracker = MemoryTracker(model, optimizer, inputs)
        with tracker:
            metrics = self._window(model, batches)
            of_last = list(metrics[-1].values()) if metrics else []
            # On the host a window has all of its batches to the end in any case; on a device what holds them does.
            given = [] if self.as_on_cuda else inputs
            tracker.trace.held_metrics = storage_bytes([*given, *of_last]) - storage_bytes(given)
            tracker.trace.row_metrics = sum(one.nbytes for one in of_last if one.dim())
            del metrics, of_last
            if optimizer is not None:
                optimizer.step()
        return tracker.trace

    def _window(self, model: nn.Module, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """Forward and backward of all micro-batches, as the engine runs them; their metrics."""
        parameters, modules = list(model.parameters()), list(model.modules())
        sharded = sharded_modules(modules)
        gradients = GradientBuffer(parameters, self.precision.sums)
        run, back_propagate = self.precision.around(self.loss_fn), BackPropagation()
        metrics: list[dict[str, Tensor]] = []
        for index, batch in enumerate(batches):
            set_reducing(sharded, index == len(batches) - 1 or not self.reduces_once)
            with saved_tensors_hooks(_off, _on) if self.is_offloading else nullcontext():
                output = run(model, batch)
                if isinstance(output, tuple):
                    output, of_batch = read_pair(output)
                    metrics.append({name: one.detach() for name, one in of_batch.items() if isinstance(one, Tensor)})
                terms = read_terms(output)
                del output
                gathered = gathered_parameters(sharded_modules(modules))  # by the forward pass
                own = set(map(id, [*parameters, *gathered]))
                others = [leaf for leaf in graph_leaves(terms.values()) if id(leaf) not in own]
                with _without_gradients(others, is_fake=isinstance(parameters[0], FakeTensor)):
                    back_propagate([(term, 1.0) for term in terms.values()])
                    del terms
        gradients.settle()
        return metrics


def _copy(model: nn.Module, optimizer: torch.optim.Optimizer | None, mode: FakeTensorMode | None) -> Copies:
    """Model and optimizer with tensors of their own; under a mode fake ones, in shards where the model has them.

    Raises:
        DistributedError: it has shards, which no rank can run alone; or fakes cannot be sharded in the same way.
    """
    is_sharded = bool(sharded_modules(list(model.modules())))
    if mode is None:
        if is_sharded:
            raise DistributedError("its parameters are sharded: no rank can run it alone")
        return copy.deepcopy((model, optimizer))
    memo: dict[int, Any] = {}
    if is_sharded:
        recipe = ShardingRecipe(model)
        with mode:
            memo |= recipe.whole_parameters()
    memo |= {id(tensor): _fake(tensor, mode) for tensor in _tensors(model, optimizer) if id(tensor) not in memo}
    if not is_sharded:
        return copy.deepcopy(model, memo), copy.deepcopy(optimizer, memo)
    copied = recipe.copy(memo)
    with mode:
        memo |= recipe.apply(copied)  # which an optimizer steps
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


@contextmanager
def _without_gradients(others: Sequence[Tensor], is_fake: bool) -> Iterator[None]:
    """Set aside the gradients of leaves that are not in the model; TypeError where one is real, and the model fake."""
    for other in others:
        if is_fake and not isinstance(other, FakeTensor):
            raise TypeError(f"loss_fn trains a tensor of shape {tuple(other.shape)} that is not in the model")
    gradients = [other.grad for other in others]
    _drop(others)
    try:
        yield
    finally:
        for other, gradient in zip(others, gradients, strict=True):
            other.grad = gradient


def _drop(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


def _off(tensor: Tensor) -> tuple[Any, ...]:
    """As `save_on_cpu`, on fake tensors too: what is saved is off the device until it is needed."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _on(saved: tuple[Any, ...]) -> Tensor:
    shape, stride, dtype, device = saved
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def watching(own: CustomGenerators, model: nn.Module) -> AbstractContextManager[object]:
    """Let it see the generators that a model draws from; not of a compiled one, which would be compiled again."""
    compiled = [getattr(one, "_compiled_call_impl", None) or hasattr(one, "_orig_mod") for one in model.modules()]
    return nullcontext() if any(compiled) else own
