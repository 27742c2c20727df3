"""A probe run: forward and backward passes without side effects, inside a `Snapshot` that puts everything back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.parameter import is_lazy

from gradfold.batch.nesting import Batch, Marks, in_own_containers, map_tensors
from gradfold.engine.backward import BackPropagation
from gradfold.engine.graph import leaves_of, walk
from gradfold.engine.loss_terms import LossFn, loss_terms_of
from gradfold.engine.model_checks import parameters_with_hooks
from gradfold.errors import HookError
from gradfold.messages import join_names
from gradfold.self_check.rng_replay import GeneratorMode
from gradfold.state.gradients import parameters_of, whole_of
from gradfold.state.rng import RandomState
from gradfold.state.snapshot import Snapshot

_MAX_ELEMENTS = 2**17  # of all gradients together that are compared
_MAX_WATCHED = 64  # of each parameter, to see whether it has moved

Shares: TypeAlias = Callable[[str], float]
"""From the name of a loss term to the normalized weight with which it is back-propagated."""


class ProbeResult(NamedTuple):
    """What one run gave: a bounded sample of the gradient, per parameter, and the loss terms by name."""

    gradients: list[Tensor | None]
    losses: Mapping[str, Tensor]


class ProbeRun:
    """Runs batches on a model, with some modules frozen (in evaluation mode); the `with` block undoes all changes.

    Attributes:
        hooked: the parameters whose gradient a hook sees, by name; not within the block.
        watch: what is called with the loss terms of a run before they are back-propagated.
        has_drawn_unseen: whether a backward pass has drawn random numbers outside of its mode (in a hook).
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, back_propagate: BackPropagation, frozen: Iterable[nn.Module] = ()
    ) -> None:
        self.model = model
        self.modules = list(model.modules())
        self.parameters = parameters_of(self.modules)
        self.snapshot = Snapshot(model, self.modules, self.parameters, probe=(loss_fn,))
        self._loss_fn = loss_fn
        self._back_propagate = back_propagate
        self._frozen = frozen
        self._changes_inputs = False
        self._has_run = False
        self.watch: Callable[[Mapping[str, Tensor]], None] | None = None
        self.has_drawn_unseen = False
        # The window warns of hooks on gradients; here they would hide what the loss itself does.
        self.hooked = parameters_with_hooks(model, self.parameters)
        self._hooks = [
            (one._backward_hooks, dict(one._backward_hooks)) for one in self.parameters if one._backward_hooks
        ]

    def __enter__(self) -> ProbeRun:
        self.snapshot.__enter__()
        for module in self._frozen:
            module.training = False
        for hooks, _ in self._hooks:
            hooks.clear()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.snapshot.__exit__(*error)
        finally:
            for hooks, before in self._hooks:
                hooks.update(before)

    def run(self, batch: Batch, shares: Shares, mode: GeneratorMode = None, only: str | None = None) -> ProbeResult:
        """One forward and backward pass under `mode`, of the loss terms that have a share, or `only` this one."""
        batch = map_tensors(torch.clone, batch)  # a model may change its input in place
        with mode or nullcontext():
            terms = self._forward(batch)
        if self.watch is not None:
            self.watch(terms)
        weighted = [(term, shares(name)) for name, term in terms.items() if only in (None, name) and shares(name)]
        nodes = list(walk(term.grad_fn for term, _ in weighted))
        self.snapshot.gradients.set_aside(leaves_of(nodes))  # all but those behind a reentrant checkpoint
        trained = () if self._has_run else [one for one in self.parameters if one.requires_grad]
        watched = [(one, one._version, _values(one)) for one in trained]
        # A mode sees every operator, which takes as long as many of them. A backward pass has the most, and draws where
        # it runs Python: in a function of the user's, or a checkpoint.
        is_seen = mode is None or mode.may_draw_again or any(isinstance(node, BackwardCFunction) for node in nodes)
        before = None if is_seen else RandomState.record(self.parameters)
        with mode if is_seen and mode is not None else nullcontext():
            self._back_propagate(weighted)
        self.has_drawn_unseen |= before is not None and before.has_moved()
        self._has_run = True
        self._refuse_steps(watched)
        self._changes_inputs |= Marks(batch, is_new=True).changed() is not None
        gradients = sample_gradients(self.parameters)
        self.drop_gradient()
        return ProbeResult(gradients, {name: term.detach() for name, term in terms.items()})

    def step(self, batch: Batch, shares: Shares) -> None:
        """One forward and backward pass as fast as the engine's, after a `run`; the gradient stays until the end."""
        if self._changes_inputs:
            batch = map_tensors(torch.clone, batch)
        terms = self._forward(in_own_containers(batch))
        self._back_propagate([(term, shares(name)) for name, term in terms.items()])

    def drop_gradient(self) -> None:
        """Begin another window, after steps."""
        self.snapshot.empty_gradients()

    def _refuse_steps(self, watched: Sequence[tuple[nn.Parameter, int, Tensor | None]]) -> None:
        """Raise HookError where the backward pass has changed parameters, which is too late to be undone."""
        moved = {
            id(parameter)
            for parameter, version, value in watched
            if parameter._version != version and not _are_equal(value, _values(parameter))
        }
        if moved:
            names = tuple(name for name, parameter in self.model.named_parameters() if id(parameter) in moved)
            raise HookError(
                f"{join_names(names, 3)}: changed by the backward pass of a micro-batch, so something steps there (an "
                "optimizer in a hook, also of an AccumulateGrad node), on a part of the gradient. It has stepped once, "
                "in this check. Remove the hook, and step once after accumulator.backward(batch).",
                names,
            )

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        return loss_terms_of(self._loss_fn(self.model, batch))


def sample_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Evenly spaced elements of each gradient, at most 2^17 in all, in float32 at least.

    Of a sparse gradient its sum over the rows: like the elements, a linear map of the gradient.
    """
    quota = max(1, _MAX_ELEMENTS // max(1, len(parameters)))
    return [_sample(parameter.grad, quota) for parameter in parameters]


def _sample(gradient: Tensor | None, quota: int) -> Tensor | None:
    if gradient is None or not gradient.numel():
        return None
    gradient = whole_of(gradient)  # so that all ranks judge alike
    if gradient.is_sparse:
        gradient = torch.sparse.sum(gradient.detach(), 0).to_dense()
    values = gradient.detach().reshape(-1)
    values = values[:: -(-len(values) // quota)]
    values = torch.view_as_real(values).reshape(-1) if values.is_complex() else values
    return values.to(torch.promote_types(values.dtype, torch.float32), copy=True)


def _values(parameter: nn.Parameter) -> Tensor | None:
    """Some elements of a trained parameter, which show whether something has stepped."""
    return None if is_lazy(parameter) else _sample(parameter.detach(), _MAX_WATCHED)


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is None or other is None or torch.equal(one, other)
