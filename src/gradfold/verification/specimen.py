"""A specimen: a copy of a user's set-up, run whole or in micro-batches as often as an experiment needs.

Every run starts from the same weights, buffers, attributes and random state, since it gets a copy of its own.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.accumulator import Accumulator
from gradfold.backward import BackPropagation
from gradfold.batch import Batch, every_leaf, map_tensors
from gradfold.coupled.batch_norm import BatchNormOption
from gradfold.coupled.exact_batch_norm import uncoupled
from gradfold.coupled.keyed_dropout import keyed_dropout
from gradfold.coupled.two_phase import TwoPhaseLoss, probe_of
from gradfold.draws import DrawsOfRows, EqualDraws, RecordedDraws
from gradfold.errors import BatchNormError, GradfoldError, NonFiniteLossError
from gradfold.feed import feed
from gradfold.jitter import Jitter
from gradfold.loss import LossFn, LossOutput, read_pair, read_terms
from gradfold.random_state import HostRandomState, RandomState
from gradfold.rows import Rows
from gradfold.split import MicroBatch, split_rows, split_samples
from gradfold.sync import RanksOption, unwrapped
from gradfold.token_budget import TokenBudget
from gradfold.token_split import PaddedRows, TokenSplit
from gradfold.verification.copies import batch_in, copy_of
from gradfold.verification.draws_in_turn import DrawsInTurn
from gradfold.verification.graph import Graph
from gradfold.verification.reference import difference_norm, full_batch_gradient, gradients, relative_error
from gradfold.verification.runs import Attempt, WholeRun
from gradfold.verification.untouched import Untouched
from gradfold.weight import weigh

__all__: list[str] = []


class _EqualDraws(EqualDraws):  # type: ignore[no-untyped-call]
    """The same, for several parts one after another."""

    def go_on_with(self, rows: Rows) -> None:
        """Begin with other rows."""
        self._numbers.clear()


class Specimen:
    """A set-up in one precision.

    Attributes:
        frozen: names of the modules that run in evaluation mode.
        batch_norm: as for `Accumulator`.
    """

    def __init__(
        self, accumulator: Accumulator, batch: Batch, num_rows: int, dtype: torch.dtype | None, untouched: Untouched
    ) -> None:
        self.accumulator = accumulator
        self.num_rows = num_rows
        self.dtype = dtype
        self.frozen: frozenset[str] = frozenset()
        self.batch_norm = accumulator.batch_norm
        self._equal: tuple[RecordedDraws, Mapping[int, int]] | None = None
        self._untouched = untouched
        self._model = copy_of(accumulator.model, dtype)
        self._batch = batch if accumulator.collate is not None else self._convert(batch)
        self._users = {id(parameter) for parameter in accumulator.model.parameters()}
        self.reaches_users_model = False

    def with_frozen(self, names: Sequence[str]) -> Specimen:
        """The same with these modules in evaluation mode, too."""
        other = copy.copy(self)
        other.frozen = self.frozen | set(names)
        return other

    def with_batch_norm(self, batch_norm: BatchNormOption) -> Specimen:
        """The same under another option for BatchNorm."""
        other = copy.copy(self)
        other.batch_norm = batch_norm
        return other

    def with_equal_draws(self, recorded: RecordedDraws, dims: Mapping[int, int]) -> Specimen:
        """The same with one row's random numbers for all rows, so that it does not matter whose they are."""
        other = copy.copy(self)
        other._equal = recorded, dims
        return other

    def fresh_model(self) -> nn.Module:
        """A copy of the model as it was."""
        model = copy.deepcopy(self._model)
        for name in self.frozen:
            model.get_submodule(name).training = False
        return model

    def collate(self, samples: list[Any]) -> Batch:
        """The batch of some samples, in this precision."""
        assert self.accumulator.collate is not None
        return self._convert(self.accumulator.collate(samples))

    def whole_batch(self) -> Batch:
        """The whole batch as `loss_fn` takes it, on the device."""
        return self.on_device(self._batch if self.accumulator.collate is None else self.collate(list(self._batch)))

    def on_device(self, batch: Batch) -> Batch:
        """The batch where the model is; copied, since a model may change its input in place."""
        device = next(self.accumulator.model.parameters()).device
        return map_tensors(torch.clone, feed([MicroBatch(batch, range(self.num_rows))], device)(0))

    def collated(self, rows: tuple[range, range]) -> tuple[Batch, Batch] | None:
        """Two parts of the samples, collated by themselves; None without `collate`."""
        if self.accumulator.collate is None:
            return None
        first, second = (self.on_device(self.collate(list(self._batch[own.start : own.stop]))) for own in rows)
        return first, second

    def micro_batches(self, size: int | TokenBudget) -> list[MicroBatch]:
        """The batch cut by gradfold."""
        if isinstance(size, TokenBudget):
            collate = None if self.accumulator.collate is None else self.collate
            return TokenSplit(size).cut(self._batch, None, collate, is_first=True)
        if self.accumulator.collate is None:
            return split_rows(self._batch, size)
        return split_samples(self._batch, size, self.collate)

    def padded_rows(self, budget: TokenBudget) -> PaddedRows | None:
        """Rows with the padding of the whole batch, and without."""
        token_split = TokenSplit(budget)
        token_split.cut(self._batch, None, None if self.accumulator.collate is None else self.collate, is_first=True)
        return token_split.padded_rows()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Random states from the beginning; what the user's functions make without a dtype has that of the copy."""
        self._untouched.rewind()
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if self.dtype == torch.float64 else default)
        try:
            yield
        finally:
            torch.set_default_dtype(default)

    def loss_fn(self, model: nn.Module, batch: Batch) -> LossOutput:
        """The user's, with the gradients kept that its backward pass adds to outside of the copy."""
        output: LossOutput = self.accumulator.loss_fn(model, batch)
        self._graph(model, output)
        return output

    def examined_loss_fn(self, model: nn.Module, batch: Batch) -> LossOutput:
        """What must be the mean of its parts: the loss, or a probe of the statistics of a two-phase loss.

        Parts that run one after the other share no statistics of exact BatchNorm: there they are fixed.
        """
        if isinstance(self.accumulator.loss_fn, TwoPhaseLoss):
            output = probe_of(self.accumulator.loss_fn)(model, batch)
            self._graph(model, output)
            return output
        return uncoupled(self.loss_fn)(model, batch) if self.batch_norm == "exact" else self.loss_fn(model, batch)

    def _loss_fn_in_order(self, mode: DrawsInTurn | DrawsOfRows | _EqualDraws, order: Sequence[Rows]) -> LossFn:
        """`loss_fn` for micro-batches that come in this order, each with its own random numbers."""
        if isinstance(mode, DrawsInTurn):
            return mode.around(self.loss_fn)
        loss_fn = self.accumulator.loss_fn
        if not isinstance(loss_fn, TwoPhaseLoss):
            return _in_order(self.loss_fn, mode, order)
        statistic, loss = loss_fn.statistic, loss_fn.loss

        def watched(model: nn.Module, batch: Batch) -> Any:
            output = statistic(model, batch)
            self._watch(model, [leaf for leaf in every_leaf(output) if isinstance(leaf, Tensor)])
            return output

        def watched_loss(model: nn.Module, statistics: Any) -> LossOutput:
            output = loss(model, statistics)
            self._graph(model, output)
            return output

        # Each micro-batch comes twice.
        return replace(loss_fn, statistic=_in_order(watched, mode, [*order, *order]), loss=watched_loss)

    def run_jittered(self, precision: torch.dtype, seed: int) -> WholeRun:
        """The whole batch at once, with all parameters off by some rounding errors of this precision."""
        model = self.fresh_model()
        with Jitter(model.parameters(), seed, precision):
            return self.run_whole(model)

    def run_whole(self, model: nn.Module | None = None) -> WholeRun:
        """The whole batch at once; on a copy of the model that has run before, if it is given."""
        model = self.fresh_model() if model is None else model
        graphs = []

        def loss_fn(model: nn.Module, batch: Batch) -> LossOutput:
            output: LossOutput = self.accumulator.loss_fn(model, batch)
            graphs.append(self._graph(model, output))
            _check_grad(output)
            return output

        recorded = RecordedDraws() if self._equal is None else self._equal[0]
        mode = recorded if self._equal is None else _EqualDraws(*self._equal)
        with self.running():
            torch_state, host_state = RandomState.record(model.parameters()), HostRandomState.record()
            batch = self.whole_batch()
            collate_drew = torch_state.has_moved() or host_state.moved() is not None
            try:
                with mode, keyed_dropout(model, update=0, num_rows=self.num_rows):  # as in a first window
                    found, loss = full_batch_gradient(model, loss_fn, batch)
            finally:
                mode.restore_generators()
            drew = "collate" if collate_drew else host_state.moved()
        return WholeRun(found, loss, recorded, graphs[-1], drew)

    def run_with_others(
        self, size: int | TokenBudget | None, wrap: Callable[[nn.Module], nn.Module]
    ) -> tuple[dict[str, Tensor], int]:
        """The gradient of this rank's rows and those of others, and how many micro-batches it took here.

        Args:
            size: of micro-batches.
            wrap: wraps a copy of the model for all ranks.
        """
        model = self.fresh_model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = self.accumulator.loss_fn
            loss_fn = own if isinstance(own, TwoPhaseLoss) else self.loss_fn
            twin = self._twin(wrap(model), loss_fn, size, ranks=None)
            with self.running():
                result = twin.backward(self._own_batch())
        return gradients(unwrapped(model)), result.num_micro_batches

    def run_in_parts(self, size: int | TokenBudget, whole: WholeRun) -> Attempt:
        """The batch in micro-batches of at most this size, each row with the random numbers that it had."""
        model = self.fresh_model()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            order = self._order(size)
            mode = self._draws(whole.recorded, order)
            is_joint = isinstance(mode, DrawsInTurn)
            twin = self._twin(model, self._loss_fn_in_order(mode, order), size)
            try:
                with self.running(), mode:
                    twin.backward(self._own_batch())
            except Exception as error:
                is_found = isinstance(error, NonFiniteLossError if is_joint else (NonFiniteLossError, BatchNormError))
                if isinstance(error, GradfoldError) and not is_found:
                    raise  # what the user is told without a proof, too
                distance = math.inf if isinstance(error, NonFiniteLossError) else math.nan
                return Attempt(size, len(order), None, distance, error)
            finally:
                mode.restore_generators()
        unknown: str | None = None
        dims: Mapping[int, int] = {}
        if not isinstance(mode, _EqualDraws):
            mode.finish()
            unknown, dims = mode.unknown, mode.dims
        found = gradients(model)  # not kept: there may be many sizes
        names = {**whole.gradients, **found}
        differences = {name: difference_norm(found.get(name), whole.gradients.get(name)) for name in names}
        distance = relative_error(found, whole.gradients)
        distance = math.inf if math.isnan(distance) else distance
        return Attempt(size, len(order), differences, distance, None, unknown, dims)

    def _twin(
        self, model: nn.Module, loss_fn: LossFn, size: int | TokenBudget | None, ranks: RanksOption = "alone"
    ) -> Accumulator:
        collate = None if self.accumulator.collate is None else self.collate
        return self.accumulator.twin(model, loss_fn, size, collate=collate, batch_norm=self.batch_norm, ranks=ranks)

    def _own_batch(self) -> Batch:
        """The batch to give away: a model may change its input in place."""
        return map_tensors(torch.clone, self._batch) if self.accumulator.collate is None else self._batch

    def _draws(self, recorded: RecordedDraws, order: Sequence[Rows]) -> DrawsInTurn | DrawsOfRows | _EqualDraws:
        make = partial(self._draws_of_rows, recorded)
        return DrawsInTurn(make, order) if self.batch_norm == "exact" else make(order[0])

    def _draws_of_rows(self, recorded: RecordedDraws, rows: Rows) -> DrawsOfRows | _EqualDraws:
        if self._equal is not None:
            return _EqualDraws(*self._equal)
        return DrawsOfRows(recorded, self.num_rows, rows)

    def _order(self, size: int | TokenBudget) -> list[Rows]:
        """The rows of micro-batches in the order in which they are run: those that weigh nothing last, if at all."""
        with self.running():
            parts = self.micro_batches(size)
            idle = weigh(self.accumulator.weight, parts).idle()
        order = [index for index in range(len(parts)) if index not in idle] + sorted(idle)
        return [parts[index].rows for index in order]

    def _graph(self, model: nn.Module, output: LossOutput) -> Graph:
        return self._watch(model, _terms(output).values())

    def _watch(self, model: nn.Module, tensors: Iterable[Tensor]) -> Graph:
        graph = Graph.of(tensors)
        own = {id(parameter) for parameter in model.parameters()}
        foreign = [leaf for leaf in graph.leaves if id(leaf) not in own]
        self._untouched.set_aside(foreign)
        self.reaches_users_model |= any(id(leaf) in self._users for leaf in foreign)
        return graph

    def _convert(self, batch: Batch) -> Batch:
        return batch if self.dtype is None else batch_in(self.dtype, batch)


def _in_order(
    loss_fn: Callable[[nn.Module, Batch], LossOutput], mode: DrawsOfRows | _EqualDraws, order: Sequence[Rows]
) -> Callable[[nn.Module, Batch], LossOutput]:
    ahead = iter(order[1:])
    is_first = True

    def call(model: nn.Module, batch: Batch) -> LossOutput:
        nonlocal is_first
        if not is_first:
            mode.go_on_with(next(ahead))
        is_first = False
        return loss_fn(model, batch)

    return call


def _terms(output: LossOutput) -> dict[str, Tensor]:
    return read_terms(read_pair(output)[0] if isinstance(output, tuple) else output)


def _check_grad(output: LossOutput) -> None:
    terms = _terms(output)
    if not any(term.requires_grad for term in terms.values()):
        BackPropagation()([(term, 1.0) for term in terms.values()])  # says what is wrong
