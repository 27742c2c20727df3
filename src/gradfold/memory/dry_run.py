"""A dry run: a window and an update on copies of model and optimizer, traced, with no side effect.

On fake tensors it takes no memory and next to no time, and its trace is that of a run on real ones. Models are copied
with their tensors replaced, since `FakeTensorMode` fails to copy some (a 0-d buffer, as BatchNorm has).
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Collection, Iterator, Sequence, Set, Sized
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gradfold.batch.batching import Batching, rows_together
from gradfold.batch.cutting import cut_rows
from gradfold.batch.nesting import Batch, every_leaf, map_tensors
from gradfold.batch.rows import num_rows
from gradfold.batch.split import Collate, fill, in_groups, num_samples
from gradfold.distributed.fsdp import ShardingRecipe, set_reducing, sharded_modules
from gradfold.distributed.torch_private import gathered_parameters
from gradfold.engine.backward import BackPropagation
from gradfold.engine.graph import graph_leaves
from gradfold.engine.loss_terms import LossFn, read_pair, read_terms
from gradfold.engine.strategy import Strategy
from gradfold.errors import DistributedError
from gradfold.memory.torch_private import BatchNormBase, FakeTensor, FakeTensorMode
from gradfold.memory.tracker import AllocationTrace, MemoryTracker, state_tensors, storage_bytes, tensors_in
from gradfold.precision import Precision
from gradfold.self_check.rng_replay import CustomGenerators
from gradfold.self_check.torch_private import is_compiled
from gradfold.state.external import ExternalState
from gradfold.state.gradients import GradientBuffer


class ProbeBatch:
    """One global batch (not a window), from which micro-batches are taken to probe their memory and speed.

    Samples to collate vary in length: there a micro-batch is the longest sample repeated, which is the worst case.
    """

    def __init__(self, batch: Batch, collate: Collate | None, batching: Batching | None = None) -> None:
        self._batch = batch
        self.collate = collate
        self._batching = batching
        count = num_rows if batching is None else batching.num_rows
        self.num_rows = count(batch) if collate is None else num_samples(batch)
        self._longest = None if collate is None else max(batch, key=extent)

    def take(self, size: int) -> Batch:
        """A micro-batch of `size` rows, on the host."""
        return self.take_unchanged(size, 0) if self.collate is None else self.collate([self._longest] * size)

    def take_unchanged(self, size: int, start: int) -> Batch:
        """The rows from `start`, with the lengths that they have."""
        if self.collate is not None:
            return self.collate(list(self._batch[start : start + size]))
        if self._batching is not None:
            groups = self._batching.groups(self._batch, self.num_rows)
            skipped = next(number for number, group in enumerate(groups) if max(group) >= start)
            return in_groups(fill(groups[skipped:], size)[0], partial(self._batching.take, self._batch)).data
        return cut_rows(self._batch, [start, size, self.num_rows - start - size])[1]

    def host_bytes(self, size: int) -> int:
        """What a window's inputs take on the host: the batch and, where it is collated, all micro-batches."""
        collated = 0 if self.collate is None else storage_bytes(every_leaf(self.take(1))) * size
        return storage_bytes(every_leaf(self._batch)) + -(-self.num_rows // size) * collated

    def device_bytes(self, size: int, block: int) -> int:
        """What they take on a device: the micro-batch in use, and the next one, which is moved ahead."""
        leaves = [leaf for leaf in every_leaf(self.take(1)) if isinstance(leaf, Tensor)]
        return sum(round_up(leaf.nbytes * size, block) for leaf in leaves) * min(2, -(-self.num_rows // size))


class Planned(Protocol):
    """What is read of an `Accumulator`, which this package cannot import."""

    model: nn.Module
    loss_fn: LossFn
    collate: Collate | None
    precision: Precision
    fsdp_reduce: Literal["per_micro_batch", "per_window"]
    batching: Any
    _strategy: Strategy


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
    coupling: str = ""  # what couples micro-batches, whose windows are other than this one
    as_on_cuda: bool = False  # run what torch would on CUDA: optimizers that step all parameters at once

    @classmethod
    def of(cls, accumulator: Planned, batch: Batch, optimizer: torch.optim.Optimizer | None = None) -> DryRun:
        """What an accumulator runs."""
        model, loss_fn, precision = accumulator.model, accumulator.loss_fn, accumulator.precision
        probe_batch = ProbeBatch(batch, accumulator.collate, rows_together(accumulator.batching))
        once = accumulator.fsdp_reduce == "per_window"
        coupling = accumulator._strategy.coupling
        return cls(model, loss_fn, probe_batch, optimizer, precision, reduces_once=once, coupling=coupling)

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

        was_collecting = gc.isenabled()
        gc.disable()  # since it would show in the trace
        try:
            own = watching(CustomGenerators(), self.model)
            with ExternalState(self.model, self.loss_fn, self.probe_batch.collate), own or nullcontext():
                batches = [map_tensors(convert, self.probe_batch.take(size)) for _ in range(num_micro_batches)]
                copies = self._copy(mode)
                with nullcontext() if mode is None else mode:
                    return self._trace(*copies, batches)
        finally:
            if was_collecting:
                gc.enable()

    def _copy(self, mode: FakeTensorMode | None) -> tuple[nn.Module, torch.optim.Optimizer | None]:
        """Model and optimizer with tensors of their own; under a mode fake ones, in shards where the model has them."""
        if mode is None:
            if sharded_modules(list(self.model.modules())):
                raise DistributedError("its parameters are sharded: no rank can run it alone")
            return copy.deepcopy((self.model, self.optimizer))
        recipe = ShardingRecipe(self.model)  # of no call, where nothing is sharded
        with mode:
            memo: dict[int, Any] = {**recipe.whole_parameters()}
        memo |= {id(tensor): _fake(tensor, mode) for tensor in self._tensors() if id(tensor) not in memo}
        model = recipe.copy(memo)
        with mode:
            memo |= recipe.apply(model)  # which an optimizer steps
        return model, copy.deepcopy(self.optimizer, memo)

    def _tensors(self) -> Iterator[Tensor]:
        """Every tensor that a copy of model and optimizer would copy."""
        for module in self.model.modules():
            yield from tensors_in(vars(module))
        if self.optimizer is not None:
            yield from tensors_in(self.optimizer.param_groups)
            yield from state_tensors(self.optimizer)

    def _trace(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Sequence[Batch]
    ) -> AllocationTrace:
        """Run the window and the update on the copies."""
        if self.checkpointed is not None:
            for layer in model.get_submodule(self.checkpointed).children():
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        model.zero_grad()
        if optimizer is not None:
            for options in optimizer.param_groups if self.as_on_cuda else ():
                if options.get("foreach", False) is None and not options.get("fused"):
                    options["foreach"] = True
            self._window(model, batches[:1])  # its state comes with the first update
            optimizer.step()
            model.zero_grad()
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
        gradients = GradientBuffer(parameters, self.precision.sums).open()
        run = self.precision.around(self.loss_fn)
        metrics: list[dict[str, Tensor]] = []
        for index, batch in enumerate(batches):
            set_reducing(sharded, index == len(batches) - 1 or not self.reduces_once)
            with _offloaded() if self.is_offloading else nullcontext():
                output = run(model, batch)
                if isinstance(output, tuple):
                    output, of_batch = read_pair(output)
                    metrics.append({name: one.detach() for name, one in of_batch.items() if isinstance(one, Tensor)})
                terms = read_terms(output)
                del output
                gathered = gathered_parameters(sharded_modules(modules))  # by the forward pass
                own = set(map(id, [*parameters, *gathered]))
                _back_propagate(terms.values(), own, is_fake=isinstance(parameters[0], FakeTensor))
                del terms
        gradients.settle()
        return metrics


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake of a tensor; of a number on the host one that keeps its value, since optimizers read their counts."""
    if tensor.dim() or not tensor.is_cpu or isinstance(tensor, nn.Parameter):
        return mode.from_tensor(tensor)
    value = tensor.item()
    with mode:
        return torch.tensor(value, dtype=tensor.dtype)


def _back_propagate(terms: Collection[Tensor], own: Set[int], is_fake: bool) -> None:
    """Leave the gradients of leaves outside the model; TypeError where one is real, and the model fake."""
    others = [leaf for leaf in graph_leaves(terms) if id(leaf) not in own]
    for other in others:
        if is_fake and not isinstance(other, FakeTensor):
            raise TypeError(f"loss_fn trains a tensor of shape {tuple(other.shape)} that is not in the model")
    gradients = GradientBuffer(())
    gradients.set_aside(others)
    try:
        BackPropagation()([(term, 1.0) for term in terms])
    finally:
        gradients.put_back(())


def _offloaded() -> saved_tensors_hooks:
    """As `save_on_cpu`, on fake tensors too: what is saved is off the device until it is needed."""

    def pack(tensor: Tensor) -> Callable[[], Tensor]:
        shape, stride, dtype, device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)

    return saved_tensors_hooks(pack, lambda make: make())


def watching(own: CustomGenerators, model: nn.Module) -> CustomGenerators | None:
    """What sees the generators that a model draws from; None for a compiled one, which would be compiled again."""
    return None if is_compiled(model.modules()) else own


def round_up(num_bytes: int, block: int) -> int:
    """Memory as an allocator hands it out, in blocks."""
    return -(-num_bytes // block) * block


def extent(sample: Any) -> int:
    """How much there is of a sample: elements of tensors and arrays, letters of text, and one for each other value."""
    found = 0
    for leaf in every_leaf(sample):
        size = leaf.numel() if isinstance(leaf, Tensor) else getattr(leaf, "size", None)
        if not isinstance(size, int):
            size = len(leaf) if isinstance(leaf, Sized) else 1
        found += size
    return found
