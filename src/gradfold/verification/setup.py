"""The set-up of experiments without side effects: each runs a new copy of the user's model, as it was at the start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradfold.accumulator import Accumulator
from gradfold.batch.batching import Batching, rows_together
from gradfold.batch.nesting import Batch, every_leaf, map_leaves, map_tensors
from gradfold.batch.rows import Rows
from gradfold.batch.split import Collate, MicroBatch
from gradfold.batchnorm.policy import BatchNormOption
from gradfold.distributed.ddp import DistributedOption, unwrapped
from gradfold.engine.backward import BackPropagation
from gradfold.engine.graph import graph_leaves
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.model_checks import refuse_lazy
from gradfold.engine.prefetch import prefetch
from gradfold.engine.strategy import Strategy
from gradfold.engine.window import Context
from gradfold.errors import ModelError
from gradfold.messages import first_line
from gradfold.packing.token_budget import TokenBudget
from gradfold.self_check.probe_run import ProbeRun
from gradfold.self_check.rng_replay import RecordedRandomness, RowRandomness
from gradfold.twophase.loss import wrap_loss

Size: TypeAlias = int | TokenBudget
"""Of micro-batches: in rows, or in padded tokens."""


@dataclass(frozen=True)
class Setup:
    """A set-up of a user's accumulator in one precision."""

    accumulator: Accumulator  # the user's
    probe: ProbeRun  # of the user's model, unwrapped
    given: Batch  # as the user passed it
    num_rows: int
    dtype: torch.dtype | None  # of model and batch; None: their own
    batch_norm: BatchNormOption
    frozen: frozenset[str]  # names of the modules that run in evaluation mode
    # The random numbers of one row, for all rows, and the dimensions that hold rows; None: each row has its own.
    shared_randomness: tuple[RecordedRandomness, Mapping[int, int]] | None = None

    @cached_property
    def _model(self) -> nn.Module:
        return _copy_of(self.probe.model, self.dtype)

    def fresh_model(self) -> nn.Module:
        """Another copy of the model; raises ModelError where it cannot be copied."""
        model = copy.deepcopy(self._model)
        for name in self.frozen:
            model.get_submodule(name).training = False
        return model

    @property
    def own_dtypes(self) -> set[torch.dtype]:
        """The floating point dtypes of the user's parameters."""
        return {parameter.dtype for parameter in self.probe.parameters if parameter.is_floating_point()}

    # The batch

    @property
    def collate(self) -> Collate | None:
        """The user's, whose batches are brought into this precision."""
        collate = self.accumulator.collate
        return None if collate is None else lambda samples: _batch_in(self.dtype, collate(samples))

    def batch(self) -> Batch:
        """The whole batch as an accumulator takes it; a copy, since a model may change its input in place."""
        return map_tensors(torch.clone, _batch_in(self.dtype, self.given)) if self.collate is None else self.given

    def whole_batch(self) -> Batch:
        """The whole batch as `loss_fn` takes it, on the device."""
        return self._on_device(self.batch()) if self.collate is None else self.collated(range(self.num_rows))

    def collated(self, rows: range) -> Batch:
        """Some samples, collated by themselves, as `loss_fn` takes them."""
        assert self.collate is not None
        return map_tensors(torch.clone, self._on_device(self.collate(list(self.given[rows.start : rows.stop]))))

    def _on_device(self, batch: Batch) -> Batch:
        device = next(self.probe.model.parameters()).device
        return prefetch([MicroBatch(batch, range(self.num_rows))], device)(0)

    # The loss

    @property
    def loss_fn(self) -> LossFn:
        """The user's; gradients outside of the copy that its backward pass adds to are restored in the end."""
        return wrap_loss(self.accumulator.loss_fn, self._restoring)

    @property
    def strategy(self) -> Strategy:
        """How an accumulator runs it; what must be the mean of its parts is its `probe_loss`."""
        return self.clone(self.probe.model, self.loss_fn, size=None)._strategy

    def _restoring(self, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def run(model: nn.Module, argument: Any) -> Any:
            output = function(model, argument)
            own = set(map(id, model.parameters()))
            leaves = graph_leaves(leaf for leaf in every_leaf(output) if isinstance(leaf, Tensor))
            self.probe.snapshot.gradients.set_aside(leaf for leaf in leaves if id(leaf) not in own)
            return output

        return run

    # Runs

    @contextmanager
    def running(self) -> Iterator[None]:
        """Random states from the beginning; what the user's functions make without a dtype has that of the copy."""
        self.probe.snapshot.rewind()
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if self.dtype == torch.float64 else default)
        try:
            yield
        finally:
            torch.set_default_dtype(default)

    @property
    def batching(self) -> Batching | None:
        """Which rows belong together, as the accumulator says."""
        return rows_together(self.accumulator.batching)

    def randomness_of(self, recorded: RecordedRandomness, rows: Rows) -> RowRandomness:
        """Runs these rows with the random numbers that they had in the whole batch."""
        recorded, dims = self.shared_randomness or (recorded, None)
        return RowRandomness(recorded, self.num_rows, rows, dims)

    def clone(
        self, model: nn.Module, loss_fn: LossFn, size: Size | None, distributed: DistributedOption = False
    ) -> Accumulator:
        """An accumulator with the user's weights; it checks nothing, since gradients are compared."""
        clone = Accumulator(
            model,
            loss_fn,
            micro_batch_size=None if isinstance(size, TokenBudget) else size,
            batching=size if isinstance(size, TokenBudget) else self.batching,
            weight=self.accumulator.weight,
            collate=self.collate,
            batch_norm=self.batch_norm,
            distributed=distributed,
            self_check=False,
        )
        if clone._token_batcher is not None:
            clone._token_batcher.is_checked = True
        return clone


@contextmanager
def set_up(
    accumulator: Accumulator, batch: Batch, num_rows: int, dtype: torch.dtype | None, frozen: Iterable[str] = ()
) -> Iterator[Setup]:
    """A set-up; the user's model, and all else that a loss reaches, is unchanged when the block ends."""
    probe = ProbeRun(unwrapped(accumulator.model), accumulator.loss_fn, BackPropagation())
    with probe, torch.enable_grad():
        yield Setup(accumulator, probe, batch, num_rows, dtype, accumulator.batch_norm, frozenset(frozen))


def _copy_of(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    Context(model).check_trainable()
    refuse_lazy(model, "verify")
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
    if dtype is not None:
        for tensor in chain(other.parameters(), other.buffers()):
            tensor.data = _in_dtype(tensor.data, dtype)  # not .to(dtype), which makes complex parameters real
    return other


def _batch_in(dtype: torch.dtype | None, batch: Batch) -> Batch:
    """A batch whose real numbers have this precision; complex ones, twice of it."""
    return batch if dtype is None else map_leaves(partial(_in_dtype, dtype=dtype), batch)


def _in_dtype(leaf: Any, dtype: torch.dtype) -> Any:
    values = leaf.data if isinstance(leaf, PackedSequence) else leaf
    if isinstance(values, Tensor) and (values.is_floating_point() or values.is_complex()):
        return leaf.to(dtype.to_complex() if values.is_complex() else dtype)
    return leaf
