"""How a window of several micro-batches, or ranks, runs a two-phase loss: embed, loss, recompute.

    [1] embed      every micro-batch without a graph; buffers and attributes are restored, random states are recorded
    [2] loss       once, over the statistics of all ranks; each has the whole loss, the first its parameters' gradients
    [3] recompute  every micro-batch with its random state; the cached gradients of its statistics are back-propagated

The sums of gradients over ranks count [2] once, and [3] for every rank's own rows. Where one rank is out of memory in
[3], all begin again, since with other micro-batches its statistics may differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from gradfold.engine.backward import Weighed
from gradfold.engine.coordinator import Coordinator
from gradfold.engine.loss_terms import Loss, LossOutput, read_pair, read_terms
from gradfold.engine.strategy import Strategy, run_in_order
from gradfold.engine.window import Context, Window
from gradfold.errors import (
    DoesNotFitError,
    GradfoldError,
    LossError,
    NotDecomposableError,
    OptionError,
    RecomputeError,
    is_out_of_memory,
)
from gradfold.self_check.observations import Observations
from gradfold.state.gradients import parameters_of
from gradfold.state.rng import RandomStates
from gradfold.state.snapshot import Snapshot, restored_modules
from gradfold.twophase.checks import check_constants, check_window
from gradfold.twophase.left_state import LeftValue, left_values, refuse_left_state
from gradfold.twophase.loss import TwoPhaseLoss, explain, probe_of
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


@final
class TwoPhase(Strategy):
    """Embed, loss, recompute; in `loss_fn` there is autocast to the dtype `compute`, if any."""

    probes_loss = False
    joins_ranks = True
    coupling = "a TwoPhaseLoss"
    shards_refused = (
        "TwoPhaseLoss is not supported with fully_shard: its passes would have to gather parameters in step on all "
        "ranks. Use DistributedDataParallel."
    )

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
        self._runs: Observations[dict[str, Any]] = Observations()  # statistics without a gradient, by path
        super().__init__(probe_of(loss_fn, self._runs.note))
        self._loss_fn = loss_fn
        self._compute = compute
        self._raises = raises  # where a loss is not finite
        self._order = order  # of [3]
        self._dtypes: set[torch.dtype] = set()  # of the parameters, when the self-check ran
        self._waited_for: Coordinator | None = None  # by other ranks, until all micro-batches of this one are done
        self._differentiable: frozenset[str] | None = None  # paths of statistics with a gradient; None: not yet known
        self._keeps_graph = False  # in [1], for a statistic that differentiates something itself
        self._num_runs = 0

    def run(self, window: Window, indices: Sequence[int], snapshot: Snapshot) -> None:
        """Run [1], [2] and [3]."""
        coordinator = window.context.coordinator
        window.weights.wait()
        if self._waited_for is coordinator:
            self._is_through(coordinator, None)
        self._num_runs += 1
        looks_for_state = self._num_runs & (self._num_runs - 1) == 0  # in windows 1, 2, 4, 8, ...: it costs some losses
        while True:
            begin = RandomStates.record(window.context.parameters)
            passes = _TwoPhasePasses(window, self._loss_fn, self._differentiable, self._keeps_graph)
            is_embedded = False
            try:
                passes.embed(self._order, indices, snapshot, looks_for_state)
                is_embedded = True
                passes.statistics.join(coordinator)
                self._waited_for = coordinator
                passes.run_loss()
                passes.recompute(self._order, indices, snapshot)
                passes.check(self._compute, self._raises)
            except Exception as error:
                # torch.autograd.grad in the statistic fails without a graph; a module's fast path may differ.
                is_of_torch = isinstance(error, RuntimeError) and not isinstance(error, GradfoldError)
                is_of_graph = is_of_torch and not is_embedded and not is_out_of_memory(error)
                is_of_graph |= isinstance(error, RecomputeError) and coordinator.num_ranks == 1
                self._keeps_graph = is_of_graph and not self._keeps_graph
                if not self._keeps_graph:
                    raise
                snapshot.rewind()
                begin.restore()
                continue
            self._waited_for = None
            self._differentiable = frozenset(passes.statistics.differentiable)
            if self._is_through(coordinator, frozenset(passes.statistics.missed)):
                return
            window.watch(snapshot.gradients, is_late=True)
            snapshot.rewind()

    def _is_through(self, coordinator: Coordinator, missed: frozenset[str] | None) -> bool:
        """Whether all ranks are done, and none has missed a gradient; `missed`: None on a rank that begins again."""
        num_beginning, num_missed = coordinator.meet([float(missed is None), float(len(missed or ()))])
        if num_missed:
            self._differentiable = (self._differentiable or frozenset()).union(
                *(one for one in coordinator.exchange(missed) if one)
            )
        return not num_beginning and not num_missed

    def depends_on_split(self, context: Context) -> bool:
        """As the order in which micro-batches run."""
        return self._order.depends_on_split(context)

    def split_dependent_layers(self, context: Context) -> Mapping[str, nn.Module] | None:
        """As the order in which micro-batches run."""
        self._dtypes = {parameter.dtype for parameter in context.parameters}
        return self._order.split_dependent_layers(context)

    def judge(self, is_passed: bool) -> None:
        """Check that labels are those of rows, too."""
        found = self._runs.take()
        if is_passed and found is not None:
            check_constants(found, self._loss_fn.combine, {self._compute, *self._dtypes})

    def explain(self, error: NotDecomposableError) -> NotDecomposableError:
        """In words about statistics, not about the probe."""
        return explain(self._loss_fn, error)


class _TwoPhasePasses:
    """The three passes of a window; [3] runs in any plain order, and cached gradients take the place of a loss."""

    def __init__(
        self, window: Window, loss_fn: TwoPhaseLoss, differentiable: frozenset[str] | None, keeps_graph: bool
    ) -> None:
        self.context = window.context
        self.backward = window.backward
        self.statistics = Statistics(loss_fn.combine, differentiable or frozenset())
        self._window = window
        self._loss_fn = loss_fn
        self._first_has_graph = differentiable is None  # to see which statistics have a gradient
        self._keeps_graph = keeps_graph
        self._left: Mapping[str, LeftValue] = {}  # what statistic has changed on the model
        self._states: dict[int, RandomStates] = {}  # with which each micro-batch began
        self._loss: Loss  # of the whole batch, detached
        self._metrics: Mapping[str, Any] = {}
        self._has_graph = False  # whether the loss depends on anything that has a gradient
        self._reaches_parameters = False  # whether some parameter got a gradient

    def embed(self, order: Strategy, indices: Sequence[int], snapshot: Snapshot, looks_for_state: bool) -> None:
        """[1] Collect the statistics, and what they leave on the model."""
        window = self._window
        parameters = parameters_of(list(window.model.modules()))
        watching = order.watching(self.context)
        snapshot.undo.append(partial(watching.__exit__, None, None, None))
        with restored_modules(window.model) as changed, torch.no_grad(), watching:
            for index in indices:
                self._states[index] = RandomStates.record(parameters)
                torch.set_grad_enabled(self._keeps_graph or (self._first_has_graph and index == indices[0]))
                output = window.call(index, self._loss_fn.statistic)
                self.statistics.add(index, output, len(window.micro_batches[index].rows))
            self._left = left_values(window.model, changed()) if looks_for_state else {}

    @torch.enable_grad()
    def _try_loss(self) -> list[Tensor]:
        """The loss, and its gradients of statistics and parameters."""
        output = self._loss_fn.loss(self._window.model, self.statistics.for_loss())
        terms = list(read_terms(read_pair(output)[0] if isinstance(output, tuple) else output).values())
        leaves = [one for one in (*self.statistics.tensors(), *self.context.parameters) if one.requires_grad]
        summed = torch.stack([term.double() for term in terms]).sum()
        found = torch.autograd.grad(summed, leaves, allow_unused=True) if summed.requires_grad and leaves else ()
        return [*(term.detach() for term in terms), *(one for one in found if one is not None)]

    def run_loss(self) -> None:
        """[2] The loss of the whole batch, back-propagated to the statistics and to parameters that it uses itself."""
        window = self._window
        if self._left:
            refuse_left_state(window.model, self._left, self._try_loss)
        try:
            with torch.enable_grad():
                output = self._loss_fn.loss(window.model, self.statistics.for_loss())
            loss, self._metrics = read_pair(output) if isinstance(output, tuple) else (output, {})
            terms = read_terms(loss)
            self._has_graph = any(term.requires_grad for term in terms.values())
            if self._has_graph:
                window.backward([(term, 1.0) for term in terms.values()], factor=1.0)
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
        self._reaches_parameters = any(parameter.grad is not None for parameter in parameters)
        if self.context.coordinator.rank > 0:
            for parameter in parameters:
                parameter.grad = None  # all ranks have the same, and sums over ranks must count it once
        terms = {name: term.detach() for name, term in terms.items()}
        self._loss = loss.detach() if isinstance(loss, Tensor) else terms

    def recompute(self, order: Strategy, indices: Sequence[int], snapshot: Snapshot) -> None:
        """[3] Run the micro-batches again; random states are afterwards as they were before."""
        end = RandomStates.record(self._window.model.parameters())
        try:
            if len(self._window.micro_batches) > 1:
                order.run(self, indices, snapshot)
            else:
                run_in_order(self, indices)
        finally:
            end.restore()

    def forward(self, index: int) -> Weighed:
        """Run a micro-batch again; returns its statistics, each with its cached gradient."""
        self._window.check_unchanged(index)
        self._states[index].restore()
        weighed: list[tuple[Tensor, float | Tensor]] = []

        def loss_of_part(model: nn.Module, batch: Any) -> LossOutput:
            """The whole loss, with the metrics of the micro-batch's rows."""
            output = self._loss_fn.statistic(model, batch)
            weighed.extend(self.statistics.weigh(index, output))
            self.statistics.compare(index, output)
            metrics = {name: self._of_rows(name, value, index) for name, value in self._metrics.items()}
            return (self._loss, metrics) if metrics else self._loss

        self._window.forward(index, loss_of_part)
        self._reaches_parameters |= bool(weighed)
        return weighed

    def check(self, compute: torch.dtype | None, raises: bool) -> None:
        """Raise where nothing has a gradient, something is not finite, or a second run is not like the first."""
        terms = read_terms(self._loss)
        if not self.statistics.missed:
            if self.statistics.differentiable and not self._has_graph:
                self._window.backward([(term, 1.0) for term in terms.values()], factor=1.0)  # raises
            if not self._reaches_parameters:
                raise LossError(
                    "no statistic requires grad: nothing connects the loss to the model's parameters. Look for "
                    "torch.no_grad(), .detach() or an argmax in statistic(model, micro_batch), and for frozen "
                    "parameters."
                )
        check_window(self._window, self.statistics, terms, compute, raises)

    def _of_rows(self, name: str, value: Any, index: int) -> Any:
        """A metric of the whole batch, or its rows for a micro-batch."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        total = int(self._window.weights.samples.total)  # of all ranks
        if len(value) != total:
            raise LossError(
                f"the metric {name!r} has shape {tuple(value.shape)} for a batch of {total} rows; expected a 0-d "
                "tensor or one entry per row in dim 0."
            )
        parts = self._window.micro_batches
        before = sum(len(part.rows) for part in parts[:index])
        return value.narrow(0, self.context.coordinator.first_row() + before, len(parts[index].rows))
