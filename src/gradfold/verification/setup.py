"""The set-up: a frozen copy of a user's model, loss and batch, for experiments without side effects.

Every run starts from the same weights, buffers, attributes and random state, since it gets a model of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from gradfold.accumulator import Accumulator
from gradfold.batch.nesting import Batch, every_leaf, map_leaves, map_tensors
from gradfold.batch.rows import Rows
from gradfold.batch.split import Collate, MicroBatch, MicroBatcher
from gradfold.batchnorm.checks import with_frozen_statistics
from gradfold.batchnorm.policy import BatchNormOption
from gradfold.distributed.ddp import DistributedOption
from gradfold.engine.backward import BackPropagation
from gradfold.engine.graph import graph_leaves
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.prefetch import prefetch
from gradfold.engine.window import Context
from gradfold.errors import ModelError
from gradfold.messages import first_line
from gradfold.packing.padding_check import PaddingProbe
from gradfold.packing.token_batcher import TokenBatcher
from gradfold.packing.token_budget import TokenBudget
from gradfold.self_check.probe_run import ProbeRun
from gradfold.self_check.rng_replay import RecordedRandomness, RowRandomness
from gradfold.self_check.torch_private import replace_tensors
from gradfold.twophase.loss import TwoPhaseLoss, probe_of, wrap_loss
from gradfold.weights import WeightOption


@contextmanager
def without_side_effects(accumulator: Accumulator) -> Iterator[ProbeRun]:
    """The user's model, and all else that a loss reaches, is unchanged when the block ends."""
    probe = ProbeRun(accumulator.model, accumulator.loss_fn, BackPropagation())
    with probe, torch.enable_grad():
        yield probe


@dataclass(frozen=True)
class Setup:
    """A set-up of a user's accumulator in one precision.

    Attributes:
        batch: the whole batch as an accumulator takes it, in this precision.
        dtype: of model and batch; None: their own.
        frozen: names of the modules that run in evaluation mode.
        shared_randomness: the random numbers of one row, for all rows, and the dimensions that hold rows; None: each
            row has its own.
    """

    accumulator: Accumulator
    batch: Batch
    num_rows: int
    dtype: torch.dtype | None
    frozen: frozenset[str]
    batch_norm: BatchNormOption
    shared_randomness: tuple[RecordedRandomness, Mapping[int, int]] | None
    _model: nn.Module
    _probe: ProbeRun

    @classmethod
    def of(
        cls, accumulator: Accumulator, batch: Batch, num_rows: int, dtype: torch.dtype | None, probe: ProbeRun
    ) -> Setup:
        """Copy the user's model and batch; raises ModelError where the model cannot be copied."""
        if dtype is not None and accumulator.collate is None:
            batch = _batch_in(dtype, batch)
        model = _copy_of(accumulator.model, dtype)
        return cls(accumulator, batch, num_rows, dtype, frozenset(), accumulator.batch_norm, None, model, probe)

    def fresh_model(self) -> nn.Module:
        """Another copy of the model."""
        model = copy.deepcopy(self._model)
        for name in self.frozen:
            model.get_submodule(name).training = False
        return model

    @property
    def weight(self) -> WeightOption:
        """The user's."""
        return self.accumulator.weight

    # The batch

    @property
    def collate(self) -> Collate | None:
        """The user's, whose batches are brought into this precision."""
        collate, dtype = self.accumulator.collate, self.dtype
        if collate is None or dtype is None:
            return collate
        return lambda samples: _batch_in(dtype, collate(samples))

    def whole_batch(self) -> Batch:
        """The whole batch as `loss_fn` takes it, on the device."""
        return self._on_device(self.batch if self.collate is None else self.collate(list(self.batch)))

    def recollated(self, rows: tuple[range, range]) -> list[Batch] | None:
        """Two parts of the samples, collated by themselves; None without `collate`."""
        collate = self.collate
        return collate and [self._on_device(collate(list(self.batch[own.start : own.stop]))) for own in rows]

    def micro_batches(self, size: int | TokenBudget) -> list[MicroBatch]:
        """The batch as gradfold splits it."""
        if isinstance(size, TokenBudget):
            return TokenBatcher(size, self.collate).split(self.batch)
        return MicroBatcher(size, self.collate).split(self.batch)

    def padded_rows(self, budget: TokenBudget) -> PaddingProbe | None:
        """Rows with the padding of the whole batch, and without."""
        batcher = TokenBatcher(budget, self.collate)
        batcher.split(self.batch)
        return batcher.padding_probe()

    def batch_for_accumulator(self) -> Batch:
        """The batch for an accumulator; copied, since a model may change its input in place."""
        return map_tensors(torch.clone, self.batch) if self.collate is None else self.batch

    def _on_device(self, batch: Batch) -> Batch:
        device = next(self.accumulator.model.parameters()).device
        return map_tensors(torch.clone, prefetch([MicroBatch(batch, range(self.num_rows))], device)(0))

    # The loss

    @property
    def loss_fn(self) -> LossFn:
        """The user's; gradients outside of the copy that its backward pass adds to are restored in the end."""
        return wrap_loss(self.accumulator.loss_fn, self._restoring)

    @property
    def checked_loss_fn(self) -> LossFn:
        """What must be the mean of its parts: the loss, or a probe of the statistics of a two-phase loss.

        Parts that run one after the other share no statistics of exact BatchNorm: there they are frozen.
        """
        loss_fn = self.loss_fn
        if isinstance(loss_fn, TwoPhaseLoss):
            return probe_of(loss_fn)
        return with_frozen_statistics(loss_fn) if self.batch_norm == "exact" else loss_fn

    def _restoring(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def run(model: nn.Module, argument: Any) -> Any:
            output = function(model, argument)
            own = set(map(id, model.parameters()))
            leaves = graph_leaves(leaf for leaf in every_leaf(output) if isinstance(leaf, Tensor))
            self._probe.snapshot.gradients.set_aside(leaf for leaf in leaves if id(leaf) not in own)
            return output

        return run

    # Runs

    @contextmanager
    def running(self) -> Iterator[None]:
        """Random states from the beginning; what the user's functions make without a dtype has that of the copy."""
        self._probe.snapshot.rewind()
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if self.dtype == torch.float64 else default)
        try:
            yield
        finally:
            torch.set_default_dtype(default)

    def randomness_of(self, recorded: RecordedRandomness, rows: Rows) -> RowRandomness:
        """Runs these rows with the random numbers that they had in the whole batch."""
        if self.shared_randomness is not None:
            recorded, dims = self.shared_randomness
            return RowRandomness(recorded, self.num_rows, rows, dims)
        return RowRandomness(recorded, self.num_rows, rows)


def clone_accumulator(
    user: Accumulator | Setup,
    model: nn.Module,
    loss_fn: LossFn,
    size: int | TokenBudget | None,
    distributed: DistributedOption = False,
) -> Accumulator:
    """An accumulator for another model, with the same weights; it checks nothing, since gradients are compared."""
    clone = Accumulator(
        model,
        loss_fn,
        micro_batch_size=None if isinstance(size, TokenBudget) else size,
        batching=size if isinstance(size, TokenBudget) else None,
        weight=user.weight,
        collate=user.collate,
        batch_norm=user.batch_norm,
        distributed=distributed,
        self_check=False,
    )
    if clone._token_batcher is not None:
        clone._token_batcher.is_checked = True
    return clone


def split_size(accumulator: Accumulator) -> int | TokenBudget | None:
    """How much the accumulator runs at once: rows, or a budget of padded tokens."""
    return accumulator.token_budget or accumulator.micro_batch_size


def own_dtypes(model: nn.Module) -> set[torch.dtype]:
    """The floating point dtypes of a model's parameters."""
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def _copy_of(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    Context(model).check_trainable()
    if any(map(is_lazy, model.parameters())):
        raise ModelError("the model has lazy layers that have not run yet: run one forward pass, then verify.")
    # Results of an earlier forward pass (weight_norm keeps one) cannot be deep-copied.
    results = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in results if not value.is_leaf}
    try:
        other = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({first_line(error)}), and verify runs on a copy. Make "
            "copy.deepcopy(model) work: look for locks, files, generators and tensors with a graph in attributes."
        ) from error
    if dtype is not None:  # not .to(dtype), which makes complex parameters real
        replace_tensors(other, lambda tensor: _in_dtype(tensor, dtype))
    return other


def _batch_in(dtype: torch.dtype, batch: Batch) -> Batch:
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
