"""A specimen: a copy of a user's set-up, for experiments that leave the set-up itself as it is.

Every run starts from the same weights, buffers, attributes and random state, since it gets a copy of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.accumulator import Accumulator
from gradfold.batch import Batch, every_leaf, map_tensors
from gradfold.coupled.batch_norm import BatchNormOption
from gradfold.coupled.two_phase import TwoPhaseLoss, probe_of
from gradfold.coupled.uncoupled import uncoupled
from gradfold.draws import DrawsOfRows, EqualDraws, RecordedDraws
from gradfold.feed import feed
from gradfold.loss import LossFn, LossOutput, read_pair, read_terms
from gradfold.padded_rows import PaddedRows
from gradfold.rows import Rows
from gradfold.split import MicroBatch, split_rows, split_samples
from gradfold.sync import RanksOption
from gradfold.token_budget import TokenBudget
from gradfold.token_split import TokenSplit
from gradfold.verification.copies import batch_in, copy_of
from gradfold.verification.graph import Graph
from gradfold.verification.untouched import Untouched

__all__: list[str] = []


class Specimen:
    """A set-up in one precision.

    Attributes:
        frozen: names of the modules that run in evaluation mode.
        batch_norm: as for `Accumulator`.
        equal_draws: one row's random numbers, for all rows, and the dimensions that hold rows; None: each its own.
        reaches_users_model: whether a loss was seen that depends on the user's own parameters.
    """

    def __init__(
        self, accumulator: Accumulator, batch: Batch, num_rows: int, dtype: torch.dtype | None, untouched: Untouched
    ) -> None:
        self.accumulator = accumulator
        self.num_rows = num_rows
        self.dtype = dtype
        self.frozen: frozenset[str] = frozenset()
        self.batch_norm = accumulator.batch_norm
        self.equal_draws: tuple[RecordedDraws, Mapping[int, int]] | None = None
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
        other.equal_draws = recorded, dims
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

    def draws_of(self, recorded: RecordedDraws, rows: Rows) -> DrawsOfRows | EqualDraws:
        """Runs these rows with the random numbers that they had in the whole batch."""
        if self.equal_draws is not None:
            return EqualDraws(*self.equal_draws)
        return DrawsOfRows(recorded, self.num_rows, rows)

    def loss_fn(self, model: nn.Module, batch: Batch) -> LossOutput:
        """The user's, with the gradients kept that its backward pass adds to outside of the copy."""
        output: LossOutput = self.accumulator.loss_fn(model, batch)
        self.watch_loss(model, output)
        return output

    def loss_fn_in_phases(self) -> LossFn:
        """The same; a two-phase loss as one, watched in both phases."""
        loss_fn = self.accumulator.loss_fn
        if not isinstance(loss_fn, TwoPhaseLoss):
            return self.loss_fn
        statistic, loss = loss_fn.statistic, loss_fn.loss

        def watched(model: nn.Module, batch: Batch) -> Any:
            output = statistic(model, batch)
            self._watch(model, [leaf for leaf in every_leaf(output) if isinstance(leaf, Tensor)])
            return output

        def watched_loss(model: nn.Module, statistics: Any) -> LossOutput:
            output = loss(model, statistics)
            self.watch_loss(model, output)
            return output

        return replace(loss_fn, statistic=watched, loss=watched_loss)

    def examined_loss_fn(self, model: nn.Module, batch: Batch) -> LossOutput:
        """What must be the mean of its parts: the loss, or a probe of the statistics of a two-phase loss.

        Parts that run one after the other share no statistics of exact BatchNorm: there they are fixed.
        """
        if isinstance(self.accumulator.loss_fn, TwoPhaseLoss):
            output = probe_of(self.accumulator.loss_fn)(model, batch)
            self.watch_loss(model, output)
            return output
        return uncoupled(self.loss_fn)(model, batch) if self.batch_norm == "exact" else self.loss_fn(model, batch)

    def twin(
        self, model: nn.Module, loss_fn: LossFn, size: int | TokenBudget | None, ranks: RanksOption = "alone"
    ) -> Accumulator:
        """An accumulator like the user's for a copy of the model."""
        collate = None if self.accumulator.collate is None else self.collate
        return self.accumulator.twin(model, loss_fn, size, collate=collate, batch_norm=self.batch_norm, ranks=ranks)

    def batch(self) -> Batch:
        """The batch as an accumulator takes it, to give away: a model may change its input in place."""
        return map_tensors(torch.clone, self._batch) if self.accumulator.collate is None else self._batch

    def watch_loss(self, model: nn.Module, output: LossOutput) -> Graph:
        """The graph behind a loss, of whose leaves outside of the copy the gradients are kept."""
        return self._watch(model, terms_of(output).values())

    def _watch(self, model: nn.Module, tensors: Iterable[Tensor]) -> Graph:
        graph = Graph.of(tensors)
        own = {id(parameter) for parameter in model.parameters()}
        foreign = [leaf for leaf in graph.leaves if id(leaf) not in own]
        self._untouched.set_aside(foreign)
        self.reaches_users_model |= any(id(leaf) in self._users for leaf in foreign)
        return graph

    def _convert(self, batch: Batch) -> Batch:
        return batch if self.dtype is None else batch_in(self.dtype, batch)


def terms_of(output: LossOutput) -> dict[str, Tensor]:
    """The loss terms in what a `loss_fn` returned."""
    return read_terms(read_pair(output)[0] if isinstance(output, tuple) else output)
