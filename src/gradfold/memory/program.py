"""A program: what training on one global batch runs, a window and an update, on copies that nobody else sees.

On fake tensors (`FakeTensorMode`) it takes no memory and next to no time, and writes the same ledger as on real ones.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from gradfold.backward import BackPropagation
from gradfold.batch import Batch, every_leaf, map_tensors
from gradfold.gradients import SetAside
from gradfold.loss import LossFn, read_pair, read_terms
from gradfold.memory.ledger import Ledger
from gradfold.memory.replica import Replica, fake_replica, real_replica
from gradfold.memory.specimen import Specimen, storage_bytes
from gradfold.memory.tracker import Tracker
from gradfold.precision import Precision
from gradfold.random_state import HostRandomState, RandomState
from gradfold.sharding import gathered_parameters
from gradfold.sync import set_reducing, sharded_modules
from gradfold.trial import graph_leaves

__all__: list[str] = []


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
    specimen: Specimen
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

    def run_fake(self, size: int, num_micro_batches: int) -> Ledger:
        """The ledger of a window of some micro-batches and its update, on fake tensors.

        Raises:
            Exception: whatever a model raises that cannot run on them.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        batches = [self._take(size, mode.from_tensor) for _ in range(num_micro_batches)]
        return self._run(fake_replica(self.model, self.optimizer, mode), batches, mode)

    def run_real(self, size: int, num_micro_batches: int) -> Ledger:
        """The same on copies of the real ones, which takes the memory that it says.

        Raises:
            Exception: whatever the model raises, or copying it.
        """
        device = next(self.model.parameters()).device
        batches = [self._take(size, lambda tensor: tensor.to(device, copy=True)) for _ in range(num_micro_batches)]
        return self._run(real_replica(self.model, self.optimizer), batches, nullcontext())

    def _take(self, size: int, convert: Callable[[Tensor], Tensor]) -> Batch:
        return map_tensors(convert, self.specimen.take(size))

    def _run(self, replica: Replica, batches: Sequence[Batch], mode: AbstractContextManager[Any]) -> Ledger:
        model, optimizer = replica
        if optimizer is not None and self.as_on_cuda:
            _work_on_all_at_once(optimizer)
        self.prepare(model)
        with _no_trace(self.model), mode:
            return self._track(model, optimizer, batches)

    def _track(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, batches: Sequence[Batch]) -> Ledger:
        _drop_gradients(model)
        if optimizer is not None:  # its state comes with the first update
            self._window(model, batches[:1])
            optimizer.step()
            _drop_gradients(model)
        tracker = Tracker()
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

    def _note_metrics(self, ledger: Ledger, metrics: Sequence[Mapping[str, Tensor]], batches: Sequence[Batch]) -> None:
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
        gradients = SetAside(parameters, precision.accumulate_dtype, precision.keep_accumulate_dtype)
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
