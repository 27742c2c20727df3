"""Exact batch normalization: a schedule in which every BatchNorm normalizes by the whole window, of all ranks.

    [1] forward    each micro-batch in a coroutine of its own runs up to its next BatchNorm and waits
    [2] join       the statistics of all are merged there, and each goes on from [1] with them
    [3] backward   once, through one autograd graph; its gradient is that of the whole batch

What forward passes save waits in host memory, so the device holds the activations of one micro-batch, and those of all
around one layer. The joint call of [2] is `joint_call.py`, the coroutines of [1] are `coroutines.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gradfold.batch.nesting import structure
from gradfold.batchnorm import intercept
from gradfold.batchnorm.checks import InputDependence, eagerly, with_frozen_statistics
from gradfold.batchnorm.coordinator import SynchronizedCoordinator
from gradfold.batchnorm.coroutines import Coroutine, coroutines
from gradfold.batchnorm.joint_call import Gather, JointCall, Normalize, Synchronize
from gradfold.batchnorm.moments import Moments, merge
from gradfold.batchnorm.mutations import ModuleMutations
from gradfold.batchnorm.offload import Offload
from gradfold.batchnorm.policy import SHARDS_REFUSED, batch_statistics_layers
from gradfold.batchnorm.torch_private import is_in_checkpoint, saved_tensor_hooks
from gradfold.engine.backward import Weighed
from gradfold.engine.loss_terms import LossFn, loss_terms_of
from gradfold.engine.strategy import Strategy
from gradfold.engine.window import Context, Window
from gradfold.errors import BatchNormError, DoesNotFitError, OptionError, is_out_of_memory
from gradfold.state.snapshot import Snapshot


@dataclass(frozen=True)
class _Request:
    """What a micro-batch waits with at a BatchNorm."""

    call: intercept.BatchNormCall
    layer: str
    moments: Moments
    has_grad: bool

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be the same for all micro-batches."""
        values = self.call.input
        return self.layer, values.shape[1], values.dtype, self.call.eps, self.has_grad


@final
class ExactBatchNorm(Strategy):
    """Every BatchNorm normalizes by the whole window, of all ranks; micro-batches may be collated one by one."""

    runs_zero_weight = True  # their rows are in the statistics
    has_own_gradients = False
    joins_ranks = True
    coupling = 'batch_norm="exact"'
    shards_refused = SHARDS_REFUSED

    def __init__(self, loss_fn: LossFn, on_non_finite: str, keeps_order: bool, is_collated: bool) -> None:
        if on_non_finite == "skip_micro_batch":
            raise OptionError(
                'batch_norm="exact" is not supported with on_non_finite="skip_micro_batch": every micro-batch is in '
                'the statistics of all, so none can be left out. Write on_non_finite="raise" or "skip_update".'
            )
        if not keeps_order:
            raise OptionError(
                'batch_norm="exact" is not supported with a TokenBudget: padding may be in the statistics of the '
                "batch, and the budget leaves most of it out. Use micro_batch_size= instead."
            )
        self._inputs = InputDependence(is_collated)
        super().__init__(with_frozen_statistics(loss_fn, self._inputs))

    def run(self, window: Window, indices: Sequence[int], snapshot: Snapshot) -> None:
        """Run all forward passes in turns, and one backward pass."""
        window.weights.wait()
        intercept.refuse_scripted(window.model)
        try:
            JointRun(window, indices, self._inputs, snapshot.undo).run()
        except Exception as error:
            if window.context.coordinator.num_ranks == 1 or not is_out_of_memory(error):
                raise
            failed = window.micro_batches[window.current]
            size = len(failed.rows)
            fix = f"Write a smaller micro_batch_size on all of them ({size // 2} or less), which changes no gradient. "
            raise DoesNotFitError(
                f'out of memory with {size} row{"s" * (size > 1)} at once{failed.where}. With batch_norm="exact" ranks '
                "wait for each other at every BatchNorm, so a single one cannot begin again with fewer rows. "
                f"{fix if size > 1 else ''}The error was: {error}",
                (size,),
            ) from error

    def find_offender(self, window: Window) -> int | None:
        """The first micro-batch whose loss is not finite with frozen statistics: a single NaN is in those of all."""
        loss_fn = with_frozen_statistics(window.loss_fn)
        for index in sorted(window.losses.non_finite()):
            with torch.no_grad():
                terms = loss_terms_of(loss_fn(window.model, window.on_device(index)))
            names = window.weights.names_at(index)
            if not all(bool(term.isfinite()) for name, term in terms.items() if names is None or name in names):
                return index
        return None

    def split_dependent_layers(self, context: Context) -> Mapping[str, nn.Module]:
        """Layers with running statistics; the others are frozen in what is probed."""
        layers = batch_statistics_layers(context.model)
        frozen = {name: layer for name, layer in layers.items() if getattr(layer, "running_mean", None) is not None}
        self._inputs.names = {id(layer.running_mean): name for name, layer in frozen.items()}
        return frozen

    def judge(self, is_passed: bool) -> None:
        """Check that every BatchNorm normalizes rows."""
        self._inputs.judge(is_passed)


class JointRun:
    """One window, run by forward passes in turns and one backward pass."""

    def __init__(
        self, window: Window, indices: Sequence[int], inputs: InputDependence, undo: list[Callable[[], object]]
    ) -> None:
        self._window = window
        self._undo = undo
        self._indices = indices
        self._tracker = intercept.LayerTracker(batch_statistics_layers(window.model))
        coordinator = window.context.coordinator
        self._group = coordinator if isinstance(coordinator, SynchronizedCoordinator) else None
        self._inputs = inputs
        self._structure = structure(window.micro_batches[0].data)
        stays = [*window.model.parameters(), *window.model.buffers()]
        self._offload = Offload(stays) if has_own_memory(window.device) else None
        self._calls: list[JointCall] = []
        # Where ranks wait in the backward pass, every joint call is in the graph by its token.
        self._token = torch.zeros((), device=window.device, requires_grad=self._group is not None)

    def run(self) -> None:
        """Run all forward passes, and one backward pass."""
        window, indices = self._window, self._indices
        functions = [partial(self._run_forward, index) for index in indices]
        self._undo.append(self._tracker.close)
        with self._tracker, eagerly():
            with coroutines(functions, window.device, window.model.parameters(), self._undo) as running:
                terms = self._run_to_end(running)
            self._tracker.check()
            if self._group is not None:
                self._group.meet_at_layer()
            if self._calls:
                self._run_backward(terms)
            if self._group is not None:
                self._group.end_backward()

    def _run_forward(self, index: int, coroutine: Coroutine) -> Weighed:
        """[1] In a thread of its own: one forward pass, with its part in every joint call."""

        def normalized(call: intercept.BatchNormCall, layer: str) -> Tensor | None:
            if not call.training:
                return None
            if is_in_checkpoint():
                raise intercept.checkpoint_error(layer)
            request = _Request(call, layer, Moments.of(call.input), torch.is_grad_enabled())
            result: Tensor = Normalize.apply(*coroutine.wait_for(request))  # type: ignore[no-untyped-call]
            return result

        mode = intercept.BatchNormMode(normalized, is_counting=index == self._indices[0])
        intercept.current_forward.set(mode)
        with mode, self._offloading():
            return self._window.forward(index)

    def _offloading(self) -> AbstractContextManager[Any]:
        if self._offload is None or saved_tensor_hooks() is not None:  # what is saved is for the user's own hooks
            return nullcontext()
        return saved_tensors_hooks(self._offload.pack, self._offload.unpack)

    def _run_to_end(self, running: Sequence[Coroutine]) -> list[tuple[Tensor, float]]:
        """[1] and [2] in turn; returns the loss terms of all.

        Where no BatchNorm is called, each micro-batch is back-propagated when its forward pass is done.
        """
        window, indices = self._window, self._indices
        mutations = ModuleMutations(window.model) if len(indices) > 1 else None
        largest = max(indices, key=lambda index: len(window.micro_batches[index].rows), default=0)
        while True:
            for number, (index, coroutine) in enumerate(zip(indices, running, strict=True)):
                window.resume(index)
                coroutine.advance()
                self._tracker.count_once(is_first=number == 0)
                if mutations is not None and not coroutine.is_done:
                    mutations.refuse(number, coroutine.request.layer)
                if running[0].is_done and coroutine.is_done and not self._calls:
                    window.backward(coroutine.result)
                    coroutine.result = None
            window.resume(largest)
            self._check_alike(running)
            if all(coroutine.is_done for coroutine in running):
                return [term for coroutine in running for term in coroutine.result or []]
            self._join(running)

    def _join(self, running: Sequence[Coroutine]) -> None:
        """[2] One joint call, which all wait for."""
        requests: list[_Request] = [coroutine.request for coroutine in running]
        first = requests[0]
        call = first.call
        moments = self._merge([request.moments for request in requests], first)
        joint = JointCall(first.layer, moments, call, self._group)
        self._calls.append(joint)
        with torch.set_grad_enabled(first.has_grad):
            with self._offloading():
                gathered = [Gather.apply(one.call.input, joint) for one in requests]  # type: ignore[no-untyped-call]
            token, *synchronized = Synchronize.apply(  # type: ignore[no-untyped-call]
                joint, self._token.to(call.input.device), call.weight, call.bias, *gathered
            )
        if first.has_grad:  # else the chain of those that have would end here
            self._token = token
        for coroutine, values in zip(running, synchronized, strict=True):
            coroutine.answer = values, joint

    def _merge(self, parts: list[Moments], first: _Request) -> Moments:
        """Those of all values; the running ones advance by them."""
        key = self._structure, len(self._calls), first.layer
        is_shared = self._inputs.is_shared(key, parts, self._window.micro_batches)
        moments = merge(parts)
        if self._group is not None:
            moments = self._group.merge(moments)
        in_whole = replace(moments, count=parts[0].count) if is_shared else moments
        if in_whole.count < 2:  # as torch says it
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {in_whole.count} in the whole batch, in "
                f"parts such as {tuple(first.call.input.shape)}"
            )
        in_whole.advance(first.call.running_mean, first.call.running_var, first.call.momentum)
        return moments

    def _run_backward(self, terms: list[tuple[Tensor, float]]) -> None:
        """[3] The backward pass of all."""
        for call in self._calls:
            call.is_backward_allowed = True
        if self._group is not None and self._token.grad_fn is not None:
            terms = [*terms, (self._token, 1.0)]  # so that joint calls which do not reach the loss run on all ranks
        self._window.backward(terms)
        self._calls.clear()

    def _check_alike(self, running: Sequence[Coroutine]) -> None:
        """Raise BatchNormError where micro-batches do not wait for the same joint call."""
        kinds = [None if coroutine.is_done else coroutine.request.kind for coroutine in running]
        other = next((at for at, kind in enumerate(kinds) if kind != kinds[0]), None)
        if other is None:
            return
        found = []
        for at in (0, other):
            index, kind = self._indices[at], kinds[at]
            place = "at its end" if kind is None else "at BatchNorm in {} ({} channels, {})".format(*kind)
            found.append(f"micro-batch {index}{self._window.micro_batches[index].where} is {place}")
        raise BatchNormError(
            f"{' while '.join(found)}: the forward passes of micro-batches diverge, so their BatchNorm has no common "
            'statistics. batch_norm="exact" needs a loss_fn that calls the same layers for all rows (no branches or '
            "loops that depend on the data, no layers dropped at random).",
            tuple(kind[0] for kind in (kinds[0], kinds[other]) if kind is not None),
        )


def has_own_memory(device: torch.device) -> bool:
    """Whether a device has another memory than the host's."""
    return device.type != "cpu"
