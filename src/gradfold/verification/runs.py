"""The runs of a proof: the whole batch at once, in plain torch, and in micro-batches, by gradfold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import Batch
from gradfold.batch.rows import Rows
from gradfold.batchnorm.intercept import current_forward
from gradfold.distributed.ddp import unwrapped
from gradfold.dropout import counter_based_dropout
from gradfold.engine.backward import BackPropagation
from gradfold.engine.graph import leaves_of, walk
from gradfold.engine.loss_terms import LossFn, LossOutput, loss_terms_of
from gradfold.errors import BatchNormError, GradfoldError, NonFiniteLossError
from gradfold.messages import first_line
from gradfold.packing.token_budget import TokenBudget
from gradfold.self_check.rng_replay import RecordedRandomness, RowRandomness, is_random
from gradfold.self_check.self_check import without_warnings
from gradfold.self_check.torch_private import TorchDispatchMode, input_dtypes, operator_name
from gradfold.twophase.loss import TwoPhaseLoss
from gradfold.verification.reference import differences, full_batch_gradient, gradients, relative_error
from gradfold.verification.setup import Setup, Size
from gradfold.verification.verdict import SizeRow
from gradfold.weights import weigh


@dataclass(frozen=True)
class WholeRun:
    """The whole batch at once, in plain torch."""

    gradients: dict[str, Tensor]
    loss: float
    recorded: RecordedRandomness
    leaves: list[Tensor]  # that its backward pass accumulated into
    dtypes: set[torch.dtype]  # on the way; a custom `autograd.Function` may use others inside
    drew: str | None  # what else was drawn from, which cannot be handed to rows: collate, random, numpy.random


@dataclass(frozen=True)
class Attempt:
    """The batch in micro-batches, by gradfold."""

    size: Size
    row: SizeRow  # its error is infinite where a loss is not finite
    differences: Mapping[str, float] = field(default_factory=dict)  # from the whole, by parameter; where it ran
    failure: Exception | None = None  # of the user's own functions, or a loss that is not finite, or BatchNorm
    unknown: str | None = None  # an operator whose random numbers could not be handed to rows
    dims: Mapping[int, int] = field(default_factory=dict)  # by number of a draw, the dimension taken for its rows


def run_whole(setup: Setup, model: nn.Module | None = None) -> WholeRun:
    """The whole batch at once; on a copy of the model that has run before, if it is passed."""
    model = setup.fresh_model() if model is None else model
    nodes: list[Any] = []

    def loss_fn(model: nn.Module, batch: Batch) -> LossOutput:
        output: LossOutput = setup.loss_fn(model, batch)
        terms = loss_terms_of(output).values()
        nodes.extend(walk(term.grad_fn for term in terms))
        if not any(term.requires_grad for term in terms):
            BackPropagation()([(term, 1.0) for term in terms])  # raises the error that says so
        return output

    shared = setup.shared_randomness
    recorded = RecordedRandomness() if shared is None else shared[0]
    mode = recorded if shared is None else setup.randomness_of(recorded, range(setup.num_rows))
    with setup.running():
        batch, snapshot = setup.whole_batch(), setup.probe.snapshot
        drew = "collate" if snapshot.has_drawn() or snapshot.has_drawn_on_host() else None
        with mode, counter_based_dropout(model, update=0, num_rows=setup.num_rows):  # as in a first window
            found, loss = full_batch_gradient(model, loss_fn, batch)
        drew = drew or snapshot.has_drawn_on_host()
    return WholeRun(found, loss, recorded, leaves_of(nodes), set().union(*map(input_dtypes, nodes)), drew)


def run_in_parts(setup: Setup, size: Size, whole: WholeRun) -> Attempt:
    """The batch in micro-batches of at most this size, each row with the random numbers that it had in the whole."""
    model, is_joint = setup.fresh_model(), setup.batch_norm == "exact"
    with without_warnings():
        order = _order(setup, model, size)
        randomness = WindowRandomness(partial(setup.randomness_of, whole.recorded), order, in_turns=is_joint)
        accumulator = setup.clone(model, randomness.around(setup.loss_fn), size)
        try:
            with setup.running(), randomness:
                accumulator.backward(setup.batch())
        except Exception as error:
            is_found = isinstance(error, NonFiniteLossError if is_joint else (NonFiniteLossError, BatchNormError))
            if isinstance(error, GradfoldError) and not is_found:
                raise  # what the accumulator itself tells the user
            off = math.inf if isinstance(error, NonFiniteLossError) else math.nan
            return Attempt(size, row_of(size, len(order), off, first_line(error)), failure=error)
    found = gradients(model)  # not kept: there may be many sizes
    off = relative_error(found, whole.gradients)
    row = row_of(size, len(order), math.inf if math.isnan(off) else off)
    return Attempt(size, row, differences(found, whole.gradients), unknown=randomness.unknown, dims=randomness.dims)


def run_on_all_ranks(setup: Setup, size: Size, wrap: Callable[[nn.Module], nn.Module]) -> tuple[dict[str, Tensor], int]:
    """The gradient of the rows of all ranks, by a wrapped copy, and how many micro-batches it took on this one."""
    model = setup.fresh_model()
    with without_warnings():
        accumulator = setup.clone(wrap(model), setup.loss_fn, size, distributed=None)
        with setup.running():
            result = accumulator.backward(setup.batch())
    return gradients(unwrapped(model)), result.num_micro_batches


def row_of(size: Size, num_micro_batches: int, error: float, failure: str | None = None, num_ranks: int = 1) -> SizeRow:
    """A row of the verdict."""
    if isinstance(size, TokenBudget):
        assert isinstance(size.max_tokens, int)
        return SizeRow(size.max_tokens, "padded tokens", num_micro_batches, error, failure, num_ranks)
    return SizeRow(size, "rows", num_micro_batches, error, failure, num_ranks)


def _order(setup: Setup, model: nn.Module, size: Size) -> list[Rows]:
    """The rows of micro-batches in the order in which they are run: those of zero weight last, if at all."""
    with setup.running():
        parts = setup.clone(model, setup.loss_fn, size)._micro_batcher.split(setup.batch())
        idle = weigh(setup.accumulator.weight, parts).zero_weight
    return [parts[index].rows for index in sorted(range(len(parts)), key=idle.__contains__)]


class WindowRandomness(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode around a window, with one `RowRandomness` inside for each forward pass, whose rows come in this order.

    What a backward pass draws (a checkpoint that runs again) belongs to the last forward pass where micro-batches run
    in order. It cannot be told apart where they run in turns: the forward pass of one is suspended for that of another.
    """

    def __init__(self, make: Callable[[Rows], RowRandomness], order: Sequence[Rows], in_turns: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._make = make
        self._ahead = cycle(order)
        self._in_turns = in_turns
        self._is_forward = False
        self._modes: list[RowRandomness] = []
        self._drew: str | None = None

    def around(self, loss_fn: LossFn) -> LossFn:
        """`loss_fn` with the draws of the rows that it is called with; in two phases each micro-batch comes twice."""
        if isinstance(loss_fn, TwoPhaseLoss):
            return replace(loss_fn, statistic=self.around(loss_fn.statistic))

        def call(model: nn.Module, batch: Batch) -> LossOutput:
            mode = self._make(next(self._ahead))
            mode.restores_on_exit = False  # other forward passes may draw from the same generators
            self._modes.append(mode)
            self._is_forward = True
            try:
                with mode:
                    return loss_fn(model, batch)
            finally:
                self._is_forward = False

        return call

    @property
    def unknown(self) -> str | None:
        """The first operator whose draws could not be handed to rows, if any."""
        return next((name for name in (self._drew, *(mode.unknown for mode in self._modes)) if name is not None), None)

    @property
    def dims(self) -> Mapping[int, int]:
        """By number of a draw, the dimension that holds its rows."""
        return {number: dim for mode in self._modes for number, dim in mode.dims.items()}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for mode in reversed(self._modes):  # the first to have met a generator has the last word
            mode.finish()
            mode.restore_generators()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_random(func):
            if self._in_turns and current_forward.get() is None:
                self._drew = self._drew or operator_name(func)
            elif not self._in_turns and not self._is_forward and self._modes:
                return self._modes[-1].__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))
