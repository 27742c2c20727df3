"""How a window of several micro-batches, or ranks, runs a two-phase loss: embed, loss, recompute.

    [1] embed      every micro-batch without a graph; buffers and attributes are restored, random states are recorded
    [2] loss       once, over the statistics of all ranks; each has the whole loss, the first its parameters' gradients
    [3] recompute  every micro-batch with its random state; the cached gradients of its statistics are back-propagated

The sums of gradients over ranks count [2] once, and [3] for every rank's own rows. Where one rank is out of memory in
[3], all begin again, since with other micro-batches its statistics may differ.

Source: GradCache, Gao, Zhang, Han and Callan 2021, arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from gradfold.engine.backward import Weighed
from gradfold.engine.coordinator import Coordinator
from gradfold.engine.loss_terms import Loss, LossOutput, read_pair, read_terms
from gradfold.engine.strategy import Strategy, run_in_order
from gradfold.engine.window import Context, Window
from gradfold.errors import DoesNotFitError, LossError, NotDecomposableError, OptionError, is_out_of_memory
from gradfold.state.gradients import parameters_of
from gradfold.state.rng import RandomStates
from gradfold.state.snapshot import Snapshot, restored_modules
from gradfold.twophase.checks import NonDifferentiableStatistics, check_window
from gradfold.twophase.loss import Statistic, TwoPhaseLoss, explain, probe_of
from gradfold.twophase.statistics import Statistics
from gradfold.weights import WeightOption

_WEIGHT = (
    ", whose loss(model, statistics) sees the whole batch: return what is to be counted (a mask, a number of tokens) "
    "from the statistic, and divide by it in loss."
)
_BATCH_NORM = '. Use GroupNorm (gradfold.convert_batch_norm(model)), or batch_norm="per_micro_batch".'
_ON_NON_FINITE = (
    ": one statistic that is not finite makes the whole loss so. Write "
    'on_non_finite="skip_update", or leave such rows out of the batch.'
)
_TOKEN_BUDGET = (
    ', whose loss would see rows in another order. Use micro_batch_size=, or statistics that are sums (combine="sum").'
)


@dataclass(frozen=True)
class WholeLoss:
    """The loss of the whole batch: its terms, detached, and metrics.

    Attributes:
        reaches_parameters: whether some parameter got a gradient from the loss alone.
        has_graph: whether it depends on anything that has a gradient.
    """

    loss: Loss
    metrics: Mapping[str, Any]
    reaches_parameters: bool
    has_graph: bool


@final
class TwoPhase(Strategy):
    """Embed, loss, recompute.

    Args:
        loss_fn: the loss as it runs, with autocast around it if any.
        weight, batch_norm, on_non_finite: as for `Accumulator`.
        order: how micro-batches run in [3].
        compute: the dtype of that autocast; an attribute as well.
        raises: whether a loss that is not finite is an error.
        keeps_order: whether micro-batches hold rows as they come.

    Raises:
        OptionError: an option is not supported.
    """

    probes_loss = False

    def __init__(
        self,
        loss_fn: TwoPhaseLoss,
        weight: WeightOption,
        batch_norm: str | None,
        on_non_finite: str,
        *,
        order: Strategy,
        compute: torch.dtype | None,
        raises: bool,
        keeps_order: bool,
    ) -> None:
        refused = (
            (weight != "samples", "weight=", _WEIGHT),
            (batch_norm not in (None, "per_micro_batch"), f'batch_norm="{batch_norm}"', _BATCH_NORM),
            (on_non_finite == "skip_micro_batch", 'on_non_finite="skip_micro_batch"', _ON_NON_FINITE),
            (loss_fn.combine == "concatenate" and not keeps_order, "a TokenBudget", _TOKEN_BUDGET),
        )
        for is_refused, option, text in refused:
            if is_refused:
                raise OptionError(f"{option} is not supported with a TwoPhaseLoss{text}")
        self._labels = NonDifferentiableStatistics(loss_fn.combine)
        super().__init__(probe_of(loss_fn, self._labels.note))
        self._loss_fn = loss_fn
        self.compute = compute
        self._raises = raises
        self._order = order
        self._dtypes: set[torch.dtype] = set()  # of the parameters, when the self-check ran
        self._waited_for: Coordinator | None = None  # by other ranks, until all micro-batches of this one are done
        self._differentiable: frozenset[str] | None = None  # paths of statistics with a gradient; None: not yet known

    def run(self, window: Window, indices: Sequence[int], snapshot: Snapshot) -> None:
        """Run [1], [2] and [3]."""
        coordinator = window.context.coordinator
        window.weights.wait()
        if self._waited_for is coordinator:
            coordinator.exchange(None)
        while True:
            statistics = Statistics(self._loss_fn.combine, self._differentiable or frozenset())
            states = self._embed(window, indices, statistics)
            statistics.join(coordinator, window.num_samples)
            self._waited_for = coordinator
            whole = self._run_loss(window, statistics)
            recompute = RecomputePass(window, self._loss_fn.statistic, statistics, states, whole)
            recompute.run(self._order, indices, snapshot)
            if not statistics.missed:
                recompute.check_graph()
            dtypes = {self.compute, statistics.lowest(), *dtypes_of(window.model)}
            check_window(window, statistics, read_terms(whole.loss), recompute.deviations, dtypes, self._raises)
            self._waited_for = None
            missed = coordinator.exchange(frozenset(statistics.missed))  # None from a rank that begins again
            self._differentiable = statistics.differentiable.union(*(one for one in missed if one))
            if all(one is not None and not one for one in missed):
                return
            snapshot.rewind()

    def is_sequential(self, context: Context) -> bool:
        """Never."""
        return False

    def is_whole(self, window: Window) -> bool:
        """Not where other ranks have statistics in the same loss."""
        return len(window.micro_batches) == 1 and window.context.coordinator.num_ranks == 1

    def depends_on_split(self, context: Context) -> bool:
        """As the order in which micro-batches run."""
        return self._order.depends_on_split(context)

    def check_shards(self) -> None:
        """Raise OptionError: embed passes would have to be in step."""
        raise OptionError(
            "TwoPhaseLoss is not supported with fully_shard: its passes would have to gather parameters in step on all "
            "ranks. Use DistributedDataParallel."
        )

    def split_dependent_layers(self, context: Context) -> Mapping[str, nn.Module] | None:
        """As the order in which micro-batches run."""
        self._dtypes = dtypes_of(context.model)
        return self._order.split_dependent_layers(context)

    def judge(self, is_passed: bool) -> None:
        """Check that labels are those of rows, too."""
        self._labels.judge(is_passed, {self.compute, *self._dtypes})

    def explain(self, error: NotDecomposableError) -> NotDecomposableError:
        """In words about statistics, not about the probe."""
        return explain(self._loss_fn, error)

    def _embed(self, window: Window, indices: Sequence[int], statistics: Statistics) -> dict[int, RandomStates]:
        """[1] Collect the statistics; returns the random states with which each micro-batch began.

        The first micro-batch of the first window has a graph, which tells the statistics that have a gradient.
        """
        states = {}
        parameters = parameters_of(list(window.model.modules()))
        with restored_modules(window.model), torch.no_grad():
            for index in indices:
                states[index] = RandomStates.record(parameters)
                torch.set_grad_enabled(self._differentiable is None and index == indices[0])
                output = window.call(index, self._loss_fn.statistic)
                statistics.add(index, output, len(window.micro_batches[index].rows))
        return states

    def _run_loss(self, window: Window, statistics: Statistics) -> WholeLoss:
        """[2] The loss of the whole batch, back-propagated to the statistics and to parameters that it uses itself."""
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
                "out of memory in loss(model, statistics) of the TwoPhaseLoss, over the statistics of the whole batch, "
                "which smaller micro-batches do not make smaller. Compute it in tiles "
                f"(gradfold.losses.info_nce(..., tile=256)), or use a smaller batch. The error was: {error}",
                (),
            ) from error
        parameters = list(window.model.parameters())
        reaches = any(parameter.grad is not None for parameter in parameters)
        if window.context.coordinator.rank > 0:
            for parameter in parameters:
                parameter.grad = None  # all ranks have the same, and sums over ranks must count it once
        detached = {name: term.detach() for name, term in terms.items()}
        return WholeLoss(loss.detach() if isinstance(loss, Tensor) else detached, metrics, reaches, has_graph)


@dataclass
class RecomputePass:
    """[3] Runs in any plain order; cached gradients of statistics take the place of a loss.

    Attributes:
        states: by micro-batch, the random states with which it began.
        deviations: by micro-batch, how far its statistics are from those of the embed pass.
    """

    window: Window
    statistic: Statistic
    statistics: Statistics
    states: Mapping[int, RandomStates]
    whole: WholeLoss
    deviations: dict[int, Tensor] = field(default_factory=dict)
    _weighed: Weighed = field(default_factory=list)
    _reaches_parameters: bool = False

    @property
    def context(self) -> Context:
        """What the window runs in."""
        return self.window.context

    def run(self, order: Strategy, indices: Sequence[int], snapshot: Snapshot) -> None:
        """Run the micro-batches; random states are afterwards as they were before."""
        end = RandomStates.record(self.window.model.parameters())
        try:
            if len(self.window.micro_batches) > 1:
                order.run(self, indices, snapshot)
            else:
                run_in_order(self, indices)
        finally:
            end.restore()

    def forward(self, index: int) -> Weighed:
        """Run a micro-batch again; returns its statistics, each with its cached gradient."""
        self.window.check_unchanged(index)
        self.states[index].restore()
        self.window.forward(index, self._loss_of_part)
        weighed, self._weighed = self._weighed, []
        self._reaches_parameters |= bool(weighed)
        return weighed

    def backward(self, weighed: Weighed) -> None:
        """Back-propagate the cached gradients."""
        self.window.backward(weighed)

    def check_graph(self) -> None:
        """Raise LossError where the loss has no gradient, or neither it nor any statistic led to a parameter."""
        if self.statistics.differentiable and not self.whole.has_graph:
            self.window.back_propagate([(term, 1.0) for term in read_terms(self.whole.loss).values()])  # raises
        if not (self._reaches_parameters or self.whole.reaches_parameters):
            raise LossError(
                "no statistic requires grad: nothing connects the loss to the model's parameters. Look for "
                "torch.no_grad(), .detach() or an argmax in statistic(model, micro_batch), and for frozen parameters."
            )

    def _loss_of_part(self, model: nn.Module, batch: Any) -> LossOutput:
        """Called as the `loss_fn` of the window: the whole loss, with the metrics of the micro-batch's rows."""
        index = self.window.current
        output = self.statistic(model, batch)
        self._weighed = self.statistics.weigh(index, output)
        self.deviations[index] = self.statistics.deviation(index, output)
        metrics = {name: self._of_rows(name, value, index) for name, value in self.whole.metrics.items()}
        return (self.whole.loss, metrics) if metrics else self.whole.loss

    def _of_rows(self, name: str, value: Any, index: int) -> Any:
        """A metric of the whole batch, or its rows for a micro-batch."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        total = self.statistics.num_samples
        if len(value) != total:
            raise LossError(
                f"the metric {name!r} has shape {tuple(value.shape)} for a batch of {total} rows; expected a 0-d "
                "tensor or one entry per row in dim 0."
            )
        before = sum(len(part.rows) for part in self.window.micro_batches[:index])
        return value.narrow(0, self.statistics.first_sample + before, len(self.window.micro_batches[index].rows))


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    """The floating point dtypes of its parameters."""
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
