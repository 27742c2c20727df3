"""The phases of a two-phase loss: how a window of several micro-batches, or ranks, runs one.

    [1] sweep      every micro-batch without a graph; buffers and attributes are put back, random states are noted
    [2] loss       once, over the statistics of all ranks; each has the whole loss, the first its parameters' gradients
    [3] replay     every micro-batch with the random state that it had; what arrived at its statistics goes on

The sums of gradients over ranks count [2] once, and [3] for every rank's own rows. Where memory runs out on one rank
in [3], all begin again, since with other micro-batches its statistics may be others.

The second run of a two-phase loss's micro-batches: what has arrived at their statistics goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.engine.backward import Weighed
from gradfold.engine.coordinator import Coordinator
from gradfold.engine.loss_terms import Loss, LossOutput, read_pair, read_terms
from gradfold.engine.window import Backward, Forward, Schedule, Window
from gradfold.errors import (
    DoesNotFitError,
    LossError,
    NonFiniteGradientError,
    NonFiniteLossError,
    OptionError,
    RecomputeError,
    is_out_of_memory,
)
from gradfold.self_check.comparison import tolerance_of_types
from gradfold.state.attributes import ModuleAttributes
from gradfold.state.buffers import BufferKeeper
from gradfold.state.gradients import parameters_of
from gradfold.state.rng import HostRandomState, RandomState
from gradfold.state.snapshot import Snapshot
from gradfold.twophase.loss import Statistic, TwoPhaseLoss
from gradfold.twophase.statistics import Statistics
from gradfold.weights import WeightOption

__all__: list[str] = []


@dataclass(frozen=True)
class WholeLoss:
    """What the loss of the whole batch gave: its terms, detached, and metrics.

    Attributes:
        reaches_parameters: whether some parameter got a gradient from it by itself.
        has_graph: whether it depends on anything that has a gradient.
    """

    loss: Loss
    metrics: Mapping[str, Any]
    reaches_parameters: bool
    has_graph: bool


@dataclass(frozen=True)
class RandomStates:
    """The random states of torch, numpy and Python."""

    torch: RandomState
    host: HostRandomState

    @classmethod
    def record(cls, parameters: Iterable[Tensor]) -> RandomStates:
        """The states now, of the devices of some tensors."""
        return cls(RandomState.record(parameters), HostRandomState.record())

    def restore(self) -> None:
        """Set the generators back."""
        self.torch.restore()
        self.host.restore()


class RecomputeRun:
    """The third phase, run by any schedule of plain windows.

    In its `with` block `loss_fn` of the window gives each micro-batch its part of what is known.

    Attributes:
        deviations: by micro-batch, how far its statistics are from what they were.
    """

    def __init__(
        self,
        window: Window,
        statistic: Statistic,
        statistics: Statistics,
        states: Mapping[int, RandomStates],
        whole: WholeLoss,
        forward: Forward,
    ) -> None:
        self.deviations: dict[int, Tensor] = {}
        self._window = window
        self._statistic = statistic
        self._statistics = statistics
        self._states = states
        self._whole = whole
        self._forward = forward
        self._reaches_parameters = whole.reaches_parameters
        self._weighed: Weighed = []
        self._stack = ExitStack()

    def __enter__(self) -> RecomputeRun:
        self._stack.enter_context(calling(self._window, self._run))
        self._end = RandomStates.record(self._window.model.parameters())
        return self

    def __exit__(self, *error: object) -> None:
        self._end.restore()
        self._stack.close()

    def forward(self, index: int) -> Weighed:
        """Run a micro-batch again; gives its statistics, each with the gradient that has arrived at it."""
        self._window.check_unchanged(index)
        self._states[index].restore()
        self._forward(index)
        weighed, self._weighed = self._weighed, []
        self._reaches_parameters |= bool(weighed)
        return weighed

    def check_reach(self) -> None:
        """Raise LossError where neither the loss nor the statistics of any micro-batch led to a parameter."""
        if not self._reaches_parameters:
            raise LossError(
                "no statistic requires grad: nothing connects the loss to the model's parameters. Look for "
                "torch.no_grad(), .detach() or an argmax in statistic(model, micro_batch), and for frozen parameters."
            )

    def _run(self, model: nn.Module, batch: Any) -> LossOutput:
        index = self._window.current
        output = self._statistic(model, batch)
        self._weighed = self._statistics.weigh(index, output)
        self.deviations[index] = self._statistics.deviation(index, output)
        metrics = {name: self._of_rows(name, value, index) for name, value in self._whole.metrics.items()}
        return (self._whole.loss, metrics) if metrics else self._whole.loss

    def _of_rows(self, name: str, value: Any, index: int) -> Any:
        """A metric of the whole batch, or its rows for a micro-batch."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        total = self._statistics.num_samples
        if len(value) != total:
            raise LossError(
                f"the metric {name!r} has shape {tuple(value.shape)} for a batch of {total} rows; expected a 0-d "
                "tensor or one entry per row in dim 0."
            )
        before = sum(len(part.rows) for part in self._window.micro_batches[:index])
        return value.narrow(0, self._statistics.first_sample + before, len(self._window.micro_batches[index].rows))


@contextmanager
def calling(window: Window, loss_fn: Callable[[Any, Any], Any]) -> Iterator[None]:
    """The window calls another `loss_fn`."""
    before, window.loss_fn = window.loss_fn, loss_fn
    try:
        yield
    finally:
        window.loss_fn = before


def check_options(weight: WeightOption, batch_norm: str | None, on_non_finite: str) -> None:
    """Raise OptionError where an option of the accumulator does not go with a two-phase loss."""
    if weight != "samples":
        raise OptionError(
            "weight= does not go with a TwoPhaseLoss, whose loss(model, statistics) sees the whole batch: let the "
            "statistic return what is to be counted (a mask, a number of tokens), and divide by it in loss."
        )
    if batch_norm not in (None, "per_micro_batch"):
        raise OptionError(
            f'batch_norm="{batch_norm}" does not go with a TwoPhaseLoss. Use GroupNorm '
            '(gradfold.convert_batch_norm(model)), or batch_norm="per_micro_batch".'
        )
    if on_non_finite == "skip_micro_batch":
        raise OptionError(
            'on_non_finite="skip_micro_batch" does not go with a TwoPhaseLoss: one statistic that is not finite makes '
            'the whole loss so. Write on_non_finite="skip_update", or leave such rows out of the batch.'
        )


class Phases:
    """Runs the windows of one accumulator in two phases.

    Args:
        loss_fn: as it is run, under autocast where that is asked for.
        compute: autocast's dtype around it; an attribute as well.
    """

    def __init__(self, loss_fn: TwoPhaseLoss, compute: torch.dtype | None) -> None:
        self._loss_fn = loss_fn
        self.compute = compute
        self._waited_for: Coordinator | None = None  # by other ranks, until all micro-batches of this one are done
        self._differentiable: frozenset[str] | None = None  # paths of statistics with a gradient; None: not known

    def schedule(
        self, window: Window, transaction: Snapshot, agreement: Coordinator, inner: Schedule, raises: bool
    ) -> Schedule:
        """How to run a window.

        Args:
            window: this one.
            transaction: in which it runs.
            agreement: with other ranks.
            inner: how to run the replays.
            raises: whether a loss that is not finite is an error.
        """

        def run(indices: Sequence[int], forward: Forward, backward: Backward) -> None:
            window.weights.arrive()
            if self._waited_for is agreement:
                agreement.share(None)
            while True:
                statistics = Statistics(self._loss_fn.combine, self._differentiable or frozenset())
                states = self._sweep(window, indices, statistics)
                statistics.join(agreement, window.num_samples)
                self._waited_for = agreement
                whole = self._run_loss(window, agreement, statistics)
                with RecomputeRun(window, self._loss_fn.statistic, statistics, states, whole, forward) as replay:
                    inner(indices, replay.forward, backward)
                    if not statistics.missed:
                        _check_graph(window, statistics, whole)
                        replay.check_reach()
                self._check(window, statistics, whole, replay.deviations, raises)
                self._waited_for = None
                missed = agreement.share(frozenset(statistics.missed))  # None from a rank that begins again
                self._differentiable = statistics.differentiable.union(*(one for one in missed if one))
                if all(one is not None and not one for one in missed):
                    return
                transaction.rewind()

        return run

    def _sweep(self, window: Window, indices: Sequence[int], statistics: Statistics) -> dict[int, RandomStates]:
        """Collect the statistics; gives the random states with which each micro-batch began.

        The first micro-batch of the first window has a graph, which tells the statistics that have a gradient.
        """
        states = {}
        parameters = parameters_of(list(window.model.modules()))
        with _without_trace(window.model), calling(window, self._loss_fn.statistic), torch.no_grad():
            for index in indices:
                states[index] = RandomStates.record(parameters)
                torch.set_grad_enabled(self._differentiable is None and index == indices[0])
                statistics.add(index, window.call(index), len(window.micro_batches[index].rows))
        return states

    def _run_loss(self, window: Window, agreement: Coordinator, statistics: Statistics) -> WholeLoss:
        """The loss of the whole batch, back-propagated to the statistics and to parameters that it uses itself."""
        try:
            with torch.enable_grad():
                output = self._loss_fn.loss(window.model, statistics.for_loss())
            loss, metrics = read_pair(output) if isinstance(output, tuple) else (output, {})
            terms = read_terms(loss)
            has_graph = any(term.requires_grad for term in terms.values())
            if has_graph:
                window.back_propagate([(term, 1.0) for term in terms.values()])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise DoesNotFitError(
                "memory ran out in loss(model, statistics) of the TwoPhaseLoss, over the statistics of the whole "
                "batch, which smaller micro-batches do not make smaller. Compute it in tiles "
                f"(gradfold.losses.info_nce(..., tile=256)), or take a smaller batch. The error was: {error}",
                (),
            ) from error
        parameters = list(window.model.parameters())
        reaches = any(parameter.grad is not None for parameter in parameters)
        if isinstance(agreement, DataParallelCoordinator) and agreement.ranks.rank > 0:
            for parameter in parameters:
                parameter.grad = None  # all ranks have the same, and sums over ranks shall count it once
        detached = {name: term.detach() for name, term in terms.items()}
        return WholeLoss(loss.detach() if isinstance(loss, Tensor) else detached, metrics, reaches, has_graph)

    def _check(
        self,
        window: Window,
        statistics: Statistics,
        whole: WholeLoss,
        deviations: Mapping[int, Tensor],
        raises: bool,
    ) -> None:
        """Raise where something is not finite, or a replay did not give the same; one transfer from the device."""
        losses = read_terms(whole.loss)
        flags = [(~gradient.isfinite()).any() for gradient in statistics.gradients()]
        waiting = [*losses.values(), *flags, *deviations.values()]
        read = torch.stack([one.to(window.device, torch.float64) for one in waiting]).tolist()
        values, is_bad, apart = read[: len(losses)], any(read[len(losses) : -len(deviations)]), read[-len(deviations) :]
        if raises and not all(map(math.isfinite, values)):
            raise _non_finite(window, statistics, dict(zip(losses, values, strict=True)))
        if raises and is_bad:
            raise NonFiniteGradientError(
                "the loss is finite, its gradient with respect to the statistics is not. Look in loss(model, "
                "statistics) for sqrt or norm at 0, division by a standard deviation of 0, or overflow.",
                None,
                range(window.num_samples),
                (),
            )
        found = [(distance, index) for distance, index in zip(apart, deviations, strict=True) if distance == distance]
        worst, index = max(found, default=(0.0, 0))
        if worst > tolerance_of_types({self.compute, statistics.lowest(), *dtypes_of(window.model)}):
            raise _not_reproduced(window, index, worst)


def _check_graph(window: Window, statistics: Statistics, whole: WholeLoss) -> None:
    """Raise LossError where there are statistics with a gradient, and the loss has none."""
    if statistics.differentiable and not whole.has_graph:
        window.back_propagate([(term, 1.0) for term in read_terms(whole.loss).values()])


@contextmanager
def _without_trace(model: nn.Module) -> Iterator[None]:
    """Put back what forward passes change in buffers and plain attributes, so that replays change it, once."""
    modules = list(model.modules())
    # A layer that does not know its shape yet learns it here, and for good.
    attributes = None if any(map(is_lazy, model.parameters())) else ModuleAttributes(modules)
    buffers = BufferKeeper()  # a new one keeps them all: what it has not kept it could not put back
    buffers.open(modules)
    try:
        yield
    finally:
        if attributes is not None:
            attributes.restore()
        buffers.restore()


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    """In which its parameters are."""
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def _non_finite(window: Window, statistics: Statistics, values: Mapping[str, float]) -> NonFiniteLossError:
    name, value = next((name, value) for name, value in values.items() if not math.isfinite(value))
    bad = statistics.non_finite()
    index = bad[0] if bad else 0
    where = (
        f"the statistics of micro-batch {index} of {len(window.micro_batches)}{window.micro_batches[index].where} are "
        "not finite. Look there for overflow, a division by a norm of 0, or rows that are not finite"
        if bad
        else "the statistics of this rank are finite. Look in loss(model, statistics) for log(0), overflow, a "
        "temperature near 0, or a ratio of empty sums"
    )
    return NonFiniteLossError(
        f"the loss term {name!r} of the whole batch is {value}; {where}; or for a learning rate too high.",
        index,
        name,
        value,
    )


def _not_reproduced(window: Window, index: int, deviation: float) -> RecomputeError:
    return RecomputeError(
        f"the statistics of micro-batch {index} of {len(window.micro_batches)}{window.micro_batches[index].where} "
        f"came out {deviation:.1%} different when it ran again, from the same rows and the same random states of "
        "torch, numpy and Python. A two-phase loss runs every micro-batch twice: look in statistic(model, micro_batch) "
        "for a generator of your own, a counter or queue outside of the model, a file that is read on, or a kernel "
        "that is not deterministic (torch.use_deterministic_algorithms(True) names it).",
        index,
        deviation,
    )
