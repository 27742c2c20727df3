"""A specimen: a copy of a user's set-up, for experiments that leave the set-up itself as it is.

Every run starts from the same weights, buffers, attributes and random state, since it gets a copy of its own.

Copies of a user's model and batch in another precision.

A graph: what autograd recorded between the parameters and a loss.

What a proof leaves untouched: a user's model, and all else that a loss reaches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from gradfold.accumulator import Accumulator
from gradfold.batch.nesting import Batch, every_leaf, map_leaves, map_tensors
from gradfold.batch.rows import Rows
from gradfold.batch.split import MicroBatch, split_rows, split_samples
from gradfold.batchnorm.checks import with_frozen_statistics
from gradfold.batchnorm.per_micro_batch import BatchNormOption
from gradfold.distributed.ddp import DistributedOption
from gradfold.engine.backward import BackPropagation
from gradfold.engine.loss_terms import LossFn, LossOutput, read_pair, read_terms
from gradfold.engine.prefetch import prefetch
from gradfold.errors import ModelError
from gradfold.packing.padding import PaddingProbe
from gradfold.packing.token_batcher import TokenBatcher
from gradfold.packing.token_budget import TokenBudget
from gradfold.self_check.rng_replay import RecordedRandomness, SharedRandomness, SlicedRandomness
from gradfold.self_check.trial import Trial
from gradfold.state.gradients import check_trainable
from gradfold.twophase.loss import TwoPhaseLoss, probe_of

__all__: list[str] = []


def own_dtypes(model: nn.Module) -> set[torch.dtype]:
    """The floating point dtypes of a model's parameters."""
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def copy_of(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a model, in another precision if there is one given.

    Raises:
        ModelError: it has nothing to train, has lazy layers, or cannot be copied.
    """
    check_trainable(model, list(model.parameters()))
    if any(map(is_lazy, model.parameters())):
        raise ModelError("the model has lazy layers that have not run yet: run one forward pass, then verify.")
    # Results of an earlier forward pass (weight_norm keeps one) refuse to be copied as they are.
    results = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in results if not value.is_leaf}
    try:
        other = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and a proof runs on a copy. "
            "Let copy.deepcopy(model) work: look for locks, files, generators and tensors with a graph in attributes."
        ) from error
    if dtype is not None:  # not .to(dtype), which makes complex parameters real
        other._apply(lambda tensor: _in_dtype(tensor, dtype))  # type: ignore[no-untyped-call]
    return other


def batch_in(dtype: torch.dtype, batch: Batch) -> Batch:
    """A batch whose real numbers have this precision; complex ones, twice of it."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _in_dtype(leaf, dtype)
        return leaf.to(dtype) if isinstance(leaf, PackedSequence) and leaf.data.is_floating_point() else leaf

    return map_leaves(convert, batch)


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor.to(dtype.to_complex()) if tensor.is_complex() else tensor


@dataclass(frozen=True)
class LossGraph:
    """What a backward pass from some loss terms runs through.

    Attributes:
        leaves: the tensors that it accumulates into.
        dtypes: of the floating point numbers on the way; a custom `autograd.Function` may use others inside.
    """

    leaves: list[Tensor]
    dtypes: set[torch.dtype]

    @classmethod
    def of(cls, terms: Iterable[Tensor]) -> LossGraph:
        """The graph behind these terms."""
        leaves: list[Tensor] = []
        dtypes: set[torch.dtype] = set()
        seen: set[Any] = set()
        ahead: list[Any] = [term.grad_fn for term in terms if term.grad_fn is not None]
        while ahead:
            node = ahead.pop()
            if node in seen:
                continue
            seen.add(node)
            dtypes |= {one.dtype for one in node._input_metadata if one.dtype.is_floating_point}
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor):
                leaves.append(leaf)
            ahead += [following for following, _ in node.next_functions if following is not None]
        return cls(leaves, dtypes)


class Untouched:
    """A user's model, and all else that a loss reaches, is as it was when the `with` block ends."""

    def __init__(self, accumulator: Accumulator) -> None:
        self._parameters = list(accumulator.model.parameters())
        self._trial = Trial(accumulator.model, accumulator.loss_fn, BackPropagation())
        self._found: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Untouched:
        self._stack.callback(self._put_back)
        self.set_aside(self._parameters)
        self._stack.enter_context(self._trial)  # buffers, attributes, random states
        self._stack.enter_context(torch.enable_grad())
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def set_aside(self, tensors: Sequence[Tensor]) -> None:
        """Keep the gradients of tensors that backward passes are about to add to."""
        for tensor in tensors:
            if id(tensor) not in self._found:
                self._found[id(tensor)] = (tensor, tensor.grad)
                tensor.grad = None

    def rewind(self) -> None:
        """Set torch's, numpy's and Python's random states to where they were at the beginning."""
        self._trial.rewind()

    def _put_back(self) -> None:
        for tensor, gradient in self._found.values():
            tensor.grad = gradient


class Setup:
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
        self.equal_draws: tuple[RecordedRandomness, Mapping[int, int]] | None = None
        self._untouched = untouched
        self._model = copy_of(accumulator.model, dtype)
        self._batch = batch if accumulator.collate is not None else self._convert(batch)
        self._users = {id(parameter) for parameter in accumulator.model.parameters()}
        self.reaches_users_model = False

    def with_frozen(self, names: Sequence[str]) -> Setup:
        """The same with these modules in evaluation mode, too."""
        other = copy.copy(self)
        other.frozen = self.frozen | set(names)
        return other

    def with_batch_norm(self, batch_norm: BatchNormOption) -> Setup:
        """The same under another option for BatchNorm."""
        other = copy.copy(self)
        other.batch_norm = batch_norm
        return other

    def with_equal_draws(self, recorded: RecordedRandomness, dims: Mapping[int, int]) -> Setup:
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
        return map_tensors(torch.clone, prefetch([MicroBatch(batch, range(self.num_rows))], device)(0))

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
            return TokenBatcher(size).cut(self._batch, None, collate, is_first=True)
        if self.accumulator.collate is None:
            return split_rows(self._batch, size)
        return split_samples(self._batch, size, self.collate)

    def padded_rows(self, budget: TokenBudget) -> PaddingProbe | None:
        """Rows with the padding of the whole batch, and without."""
        token_split = TokenBatcher(budget)
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

    def draws_of(self, recorded: RecordedRandomness, rows: Rows) -> SlicedRandomness | SharedRandomness:
        """Runs these rows with the random numbers that they had in the whole batch."""
        if self.equal_draws is not None:
            return SharedRandomness(*self.equal_draws)
        return SlicedRandomness(recorded, self.num_rows, rows)

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
        return (
            with_frozen_statistics(self.loss_fn)(model, batch)
            if self.batch_norm == "exact"
            else self.loss_fn(model, batch)
        )

    def twin(
        self, model: nn.Module, loss_fn: LossFn, size: int | TokenBudget | None, ranks: DistributedOption = "alone"
    ) -> Accumulator:
        """An accumulator like the user's for a copy of the model."""
        collate = None if self.accumulator.collate is None else self.collate
        return self.accumulator.twin(model, loss_fn, size, collate=collate, batch_norm=self.batch_norm, ranks=ranks)

    def batch(self) -> Batch:
        """The batch as an accumulator takes it, to give away: a model may change its input in place."""
        return map_tensors(torch.clone, self._batch) if self.accumulator.collate is None else self._batch

    def watch_loss(self, model: nn.Module, output: LossOutput) -> LossGraph:
        """The graph behind a loss, of whose leaves outside of the copy the gradients are kept."""
        return self._watch(model, terms_of(output).values())

    def _watch(self, model: nn.Module, tensors: Iterable[Tensor]) -> LossGraph:
        graph = LossGraph.of(tensors)
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
