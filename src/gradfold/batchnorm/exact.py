"""Exact batch normalization: a schedule in which every BatchNorm normalizes by the whole window, of all ranks.

The forward passes of all micro-batches run in lock-step: one at a time up to its next BatchNorm, where the statistics
of all are formed; then each goes on from there. So there is one autograd graph and one backward pass, whose gradient is
that of the whole batch. What forward passes save waits in host memory, so that the device holds the activations of one
micro-batch, and those of all around one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from gradfold.batch.nesting import structure
from gradfold.batchnorm.checks import InputDependence, ModuleMutations, eagerly
from gradfold.batchnorm.coordinator import LocalStatisticsGroup, StatisticsGroup, SynchronizedCoordinator
from gradfold.batchnorm.coroutines import Coroutine, Coroutines, ThreadState
from gradfold.batchnorm.global_state import GlobalState
from gradfold.batchnorm.intercept import (
    BatchCounters,
    BatchNormCall,
    BatchNormMode,
    ForwardContext,
    LayerTracker,
    is_in_checkpoint,
    passage,
    refuse_scripted,
    refused_checkpoint,
)
from gradfold.batchnorm.joint_call import CallHandle, Gather, JointCall, Normalize, join
from gradfold.batchnorm.moments import Moments, merge
from gradfold.batchnorm.offload import Offload
from gradfold.batchnorm.per_micro_batch import batch_statistics_layers
from gradfold.engine.backward import Weighed
from gradfold.engine.coordinator import Coordinator
from gradfold.engine.window import Backward, Forward, Window
from gradfold.errors import BatchNormError, DoesNotFitError, OptionError, is_out_of_memory

__all__: list[str] = []


@dataclass(frozen=True)
class _Request:
    """What a micro-batch brings to a joint call."""

    call: BatchNormCall
    layer: str
    place: CallHandle
    entered: Tensor
    moments: Moments
    has_grad: bool

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be the same for all micro-batches."""
        return self.layer, self.entered.shape[1], self.entered.dtype, self.call.eps, self.has_grad


class ExactBatchNorm:
    """Runs one window in lock-step.

    Args:
        window: whose micro-batches these are.
        layers: that normalize by the statistics of what they are given, by name.
        company: the other ranks.
        offload: None where there is no other memory than the host's, or the user's own hooks see what is saved.
        normalized: what is known of the calls.
    """

    def __init__(
        self,
        window: Window,
        layers: Mapping[str, _BatchNorm],
        company: StatisticsGroup,
        offload: Offload | None,
        normalized: InputDependence,
    ) -> None:
        self._window = window
        self._layers = layers
        self._company = company
        self._offload = offload
        self._normalized = normalized
        self._num_calls = 0
        self._structure = structure(window.micro_batches[0].data)
        self._calls: list[JointCall] = []
        self._token: Tensor | None = None
        window.runs_idle = True  # their rows are in the statistics

    def __call__(self, indices: Sequence[int], forward: Forward, backward: Backward) -> None:
        """Run all forward passes, and one backward pass.

        Raises:
            DoesNotFitError: memory ran out, and other ranks wait for this one.
        """
        try:
            self._run(indices, forward, backward)
        except Exception as error:
            if not self._company.meets_in_backward or not is_out_of_memory(error):
                raise
            raise _out_of_memory_among_ranks(self._window, error) from error

    def _run(self, indices: Sequence[int], forward: Forward, backward: Backward) -> None:
        state = ThreadState(self._window.device)
        with LayerTracker(self._layers) as attendance, eagerly():
            first = indices[0] if indices else None
            functions = [partial(self._run_forward, index, index == first, forward) for index in indices]
            process = GlobalState(self._window.model.parameters())
            with Coroutines(functions, state.on, process) as runners:
                terms = self._run_through(runners, indices, backward)
            attendance.check()
            self._company.end_forward()
            if self._calls:
                self._run_backward(terms, backward)
            self._company.end_backward()

    def _run_forward(self, index: int, is_first: bool, forward: Forward, runner: Coroutine) -> Weighed:
        """In a thread of its own: one forward pass."""
        own = ForwardContext()
        passage.set(own)
        with BatchNormMode(partial(self._meet, runner, own), counts=is_first):
            if self._offload is None or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
                return forward(index)  # what is saved is for the user's own hooks
            with self._offload.hooks():
                return forward(index)

    def _meet(self, runner: Coroutine, own: ForwardContext, call: BatchNormCall) -> Tensor:
        """In that thread: one micro-batch in a joint call."""
        own.is_met = True
        if is_in_checkpoint():
            raise refused_checkpoint(own.layer)
        place = CallHandle()
        moments = Moments.of(call.values)
        entered: Tensor = Gather.apply(call.values, place)  # type: ignore[no-untyped-call]
        joined = runner.meet(_Request(call, own.layer, place, entered, moments, torch.is_grad_enabled()))
        normalized: Tensor = Normalize.apply(joined, place)  # type: ignore[no-untyped-call]
        return normalized

    def _run_through(
        self, runners: Coroutines, indices: Sequence[int], backward: Backward
    ) -> list[tuple[Tensor, float]]:
        """Advance all from meeting to meeting; gives the loss terms of all.

        Where there is no BatchNorm on the way, each micro-batch is back-propagated when it is through.
        """
        terms: list[tuple[Tensor, float]] = []
        leftovers = ModuleMutations(self._window.model) if len(indices) > 1 else None
        counters = BatchCounters(self._layers.values())
        while True:
            for index, runner in zip(indices, runners, strict=True):
                self._window.current = index
                runner.advance()
                if runner is runners[0]:
                    counters.keep()
                else:
                    counters.put_back()
                if leftovers is not None and not runner.is_done:
                    leftovers.refuse(runners.index(runner), runner.request.layer)
                if runners[0].is_done and runner.is_done and not self._calls:
                    backward(runner.result)
                    runner.result = None
            self._window.current = max(
                indices, key=lambda index: len(self._window.micro_batches[index].rows), default=0
            )
            self._check_alike(runners, indices)
            if all(runner.is_done for runner in runners):
                break
            for runner, answer in zip(runners, self._join([runner.request for runner in runners]), strict=True):
                runner.answer = answer
            del answer
        for runner in runners:
            terms += runner.result or []
        return terms

    def _join(self, requests: list[_Request]) -> list[Tensor]:
        first = requests[0]
        call = first.call
        moments = self._statistics([request.moments for request in requests], first)
        scale, shift = (None if one is None else one.detach() for one in (call.scale, call.shift))
        joint = JointCall(first.layer, moments, scale, shift, call.eps, self._company.sum)
        self._calls.append(joint)
        for request in requests:
            request.place.call = joint
        with torch.set_grad_enabled(first.has_grad):
            token = self._company.begin_token(call.values.device) if self._token is None else self._token
            entered = [request.entered for request in requests]
            token, joined = join(joint, token.to(call.values.device), call.scale, call.shift, entered)
        if first.has_grad:  # else the chain of those that have would end here
            self._token = token
        return joined

    def _statistics(self, parts: list[Moments], first: _Request) -> Moments:
        """Those of all values; the running ones move by them."""
        key = self._structure, self._num_calls, first.layer
        self._num_calls += 1
        is_one_thing = self._normalized.is_one_thing(key, parts, self._window.micro_batches)
        moments = self._company.merge(merge(parts))
        in_whole = replace(moments, count=parts[0].count) if is_one_thing else moments
        _check_count(in_whole, first.call.values)
        _move_running_statistics(first.call, in_whole)
        return moments

    def _run_backward(self, terms: list[tuple[Tensor, float]], backward: Backward) -> None:
        for call in self._calls:
            call.may_go_back = True
        if self._company.meets_in_backward and self._token is not None and self._token.requires_grad:
            terms = [*terms, (self._token, 1.0)]  # so that joint calls which do not reach the loss run on all ranks
        self._token = None
        backward(terms)
        self._calls.clear()

    def _check_alike(self, runners: Coroutines, indices: Sequence[int]) -> None:
        """Raise BatchNormError where micro-batches are not at the same joint call."""
        kinds = [None if runner.is_done else runner.request.kind for runner in runners]
        other = next((at for at, kind in enumerate(kinds) if kind != kinds[0]), None)
        if other is None:
            return
        names = [self._where(indices[at], runners[at]) for at in (0, other)]
        layers = [runners[at].request.layer for at in (0, other) if not runners[at].is_done]
        raise BatchNormError(
            f"{names[0]} while {names[1]}: the forward passes of micro-batches take different ways, so their BatchNorm "
            'has no common statistics. batch_norm="exact" needs a loss_fn that calls the same layers for all rows '
            "(no branches or loops that depend on the data, no layers dropped at random).",
            tuple(layers),
        )

    def _where(self, index: int, runner: Coroutine) -> str:
        name = f"micro-batch {index}{self._window.micro_batches[index].where}"
        if runner.is_done:
            return f"{name} is at its end"
        request: _Request = runner.request
        channels, dtype = request.kind[1:3]
        return f"{name} is at BatchNorm in {request.layer} ({channels} channels, {dtype})"


def schedule_for(window: Window, agreement: Coordinator, normalized: InputDependence) -> ExactBatchNorm:
    """How to run a window.

    Raises:
        BatchNormError: a module is scripted, so that its BatchNorm could not be met.
    """
    refuse_scripted(window.model)
    company: StatisticsGroup = agreement if isinstance(agreement, SynchronizedCoordinator) else LocalStatisticsGroup()
    offload = None
    if _has_memory_of_its_own(window.device):
        offload = Offload([*window.model.parameters(), *window.model.buffers()])
    return ExactBatchNorm(window, batch_statistics_layers(window.model), company, offload, normalized)


def check_goes_with(on_non_finite: str) -> None:
    """Raise OptionError where micro-batches would have to be judged one by one."""
    if on_non_finite == "skip_micro_batch":
        raise OptionError(
            'batch_norm="exact" does not go with on_non_finite="skip_micro_batch": every micro-batch is in the '
            'statistics of all, so none can be left out for its own gradient. Write "raise" or "skip_update".'
        )


def _has_memory_of_its_own(device: torch.device) -> bool:
    return device.type != "cpu"


def _out_of_memory_among_ranks(window: Window, error: Exception) -> DoesNotFitError:
    failed = window.micro_batches[window.current]
    size = len(failed.rows)
    fewer = f"Write a smaller micro_batch_size on all of them ({size // 2} or less), which changes no gradient. "
    return DoesNotFitError(
        f'memory ran out with {size} row{"s" * (size > 1)} at once{failed.where}. In batch_norm="exact" several ranks '
        "wait for each other at every BatchNorm, so that none can begin again with fewer. "
        f"{fewer if size > 1 else ''}The error was: {error}",
        (size,),
    )


def _check_count(moments: Moments, values: Tensor) -> None:
    if moments.count < 2:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got {moments.count} in the whole batch, in parts "
            f"such as {tuple(values.shape)}"
        )


@torch.no_grad()
def _move_running_statistics(call: BatchNormCall, moments: Moments) -> None:
    """Once for the whole batch; with the momentum that the first micro-batch came with."""
    for running, now in ((call.running_mean, moments.mean), (call.running_var, moments.unbiased_variance)):
        if running is not None:
            running.copy_(running * (1 - call.momentum) + now * call.momentum)
