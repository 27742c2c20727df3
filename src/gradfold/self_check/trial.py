"""A trial: forward and backward passes that leave no trace.

Whatever a trial changes is as before when it ends: `.grad` of every tensor that it reached (but for those outside the
model behind a reentrant checkpoint, whose graph hides them), buffers, plain attributes of modules, and torch's, numpy's
and Python's random states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import Batch, in_own_containers, map_leaves, map_tensors
from gradfold.engine.backward import BackPropagation, graph_leaves
from gradfold.engine.loss_terms import LossFn, read_pair, read_terms
from gradfold.state.attributes import ModuleAttributes
from gradfold.state.buffers import BufferKeeper
from gradfold.state.gradients import parameters_of
from gradfold.state.rng import HostRandomState, RandomState

__all__: list[str] = []

_MAX_ELEMENTS = 2**17  # of all gradients together that are compared

Shares = Callable[[str], float]
"""From the name of a loss term to the share with which it is back-propagated."""


@dataclass(frozen=True)
class ProbeResult:
    """What one run gave: a bounded sample of the gradient, per parameter, and the loss terms by name."""

    gradients: list[Tensor | None]
    losses: Mapping[str, Tensor]


class Trial:
    """Runs parts of a batch on a model and takes everything back at the end of the `with` block.

    Attributes:
        modules, parameters: of the model.
        changes_inputs: whether a run has changed what it was given, in place.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, back_propagate: BackPropagation, frozen: Iterable[nn.Module] = ()
    ) -> None:
        self._frozen = frozen  # put into evaluation mode meanwhile
        self._model = model
        self._loss_fn = loss_fn
        self._back_propagate = back_propagate
        self._foreign: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.modules = list(model.modules())
        self.parameters = parameters_of(self.modules)
        self._own = set(map(id, self.parameters))
        self.changes_inputs = False

    def __enter__(self) -> Trial:
        self._attributes = ModuleAttributes(self.modules)
        self._buffers = BufferKeeper()
        self._buffers.open(self.modules)
        self._random_state = RandomState.record(self.parameters)
        self._host_random_state = HostRandomState.record()
        for module in self._frozen:
            module.training = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def undo(self) -> None:
        """Make everything as it was at the beginning; also after the `with` block, if more has been run since."""
        self.rewind()
        self._attributes.restore()
        for tensor, gradient in self._foreign.values():
            tensor.grad = gradient
        self._empty_gradients(self._model.parameters())  # a run may have made some

    def rewind(self) -> None:
        """Set buffers and random states to where they were at the beginning."""
        self._buffers.restore()
        self._buffers.open(self.modules)
        self._random_state.restore()
        self._host_random_state.restore()

    @property
    def can_undo_others(self) -> bool:
        """Whether `undo` would take back a run by others, too: what a trial sets aside or copies, others reach."""
        return not self._foreign and not self.changes_inputs

    def changed_buffers(self) -> list[str]:
        """The names of the buffers that differ from those at the beginning."""
        return self._buffers.changed(self._model)

    def has_drawn(self) -> bool:
        """Whether torch's random state has moved since the last rewind."""
        return self._random_state.has_moved()

    def has_drawn_on_host(self) -> str | None:
        """The module whose global generator has moved since the last rewind, if one has."""
        return self._host_random_state.moved()

    def run(
        self,
        batch: Batch,
        shares: Shares,
        mode: AbstractContextManager[Any] | None = None,
        only: str | None = None,
    ) -> ProbeResult:
        """One forward and backward pass.

        Args:
            batch: what `loss_fn` takes, on the device.
            shares: the seed of each loss term; a term whose share is 0 is not back-propagated.
            mode: is on during both passes.
            only: back-propagate this term alone.
        """
        batch = map_tensors(torch.clone, batch)  # a model may change its input in place
        marks = _marks(batch)
        with mode or nullcontext():
            output = self._loss_fn(self._model, batch)
            terms = read_terms(read_pair(output)[0] if isinstance(output, tuple) else output)
            weighed = [(term, shares(name)) for name, term in terms.items() if only in (None, name)]
            weighed = [(term, share) for term, share in weighed if share]
            self._set_aside_foreign(term for term, _ in weighed)
            self._back_propagate(weighed)
        self.changes_inputs |= _marks(batch) != marks
        gradients = sample_gradients(self.parameters)
        self._empty_gradients(self.parameters)
        return ProbeResult(gradients, {name: term.detach() for name, term in terms.items()})

    def step(self, batch: Batch, shares: Shares) -> None:
        """One forward and backward pass as fast as the engine's, after a `run`; the gradient stays until the end."""
        if self.changes_inputs:
            batch = map_tensors(torch.clone, batch)
        output = self._loss_fn(self._model, in_own_containers(batch))
        terms = read_terms(read_pair(output)[0] if isinstance(output, tuple) else output)
        self._back_propagate([(term, shares(name)) for name, term in terms.items()])

    def drop_gradient(self) -> None:
        """Begin a window anew, after steps."""
        self._empty_gradients(self.parameters)

    def _empty_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None

    def _set_aside_foreign(self, terms: Iterable[Tensor]) -> None:
        """Keep the gradients of tensors outside the model, which the backward pass adds to as well."""
        for leaf in graph_leaves(terms):
            if id(leaf) not in self._own and id(leaf) not in self._foreign:
                self._foreign[id(leaf)] = (leaf, leaf.grad)
                leaf.grad = None


def sample_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Evenly spaced elements of each gradient, at most 2^17 in all, in float32 at least.

    Of a sparse gradient its sum over the rows: like the elements, a linear map of the gradient.
    """
    quota = max(1, _MAX_ELEMENTS // max(1, len(parameters)))
    return [_sample(parameter.grad, quota) for parameter in parameters]


def _sample(gradient: Tensor | None, quota: int) -> Tensor | None:
    if gradient is not None and hasattr(gradient, "to_local"):  # of a shard
        gradient = gradient.to_local()
    if gradient is None or not gradient.numel():
        return None
    if gradient.is_sparse:
        gradient = torch.sparse.sum(gradient.detach(), 0).to_dense()
    values = gradient.detach().reshape(-1)
    values = values[:: -(-len(values) // quota)]
    values = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
    return values.to(torch.promote_types(values.dtype, torch.float32), copy=True)


def _marks(batch: Batch) -> list[tuple[int, int]]:
    """What stands in a batch, such that a change in place makes a difference."""
    found: list[tuple[int, int]] = []
    map_leaves(lambda leaf: found.append((id(leaf), leaf._version if isinstance(leaf, Tensor) else 0)), batch)
    return found
