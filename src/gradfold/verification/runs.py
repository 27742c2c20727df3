"""The runs of a proof: the whole batch at once, in plain torch, and in micro-batches, by gradfold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import Batch
from gradfold.batch.rows import Rows
from gradfold.distributed.ddp import unwrapped
from gradfold.dropout.layer import counter_based_dropout
from gradfold.engine.backward import BackPropagation
from gradfold.engine.graph import graph_nodes, leaf_of
from gradfold.engine.loss_terms import LossOutput, loss_terms_of
from gradfold.errors import BatchNormError, GradfoldError, NonFiniteLossError
from gradfold.packing.token_budget import TokenBudget
from gradfold.self_check.rng_replay import RecordedRandomness
from gradfold.self_check.self_check import without_warnings
from gradfold.self_check.torch_private import input_dtypes
from gradfold.state.rng import RandomStates
from gradfold.verification.reference import difference_norm, full_batch_gradient, gradients, relative_error
from gradfold.verification.rng_order import WindowRandomness
from gradfold.verification.setup import Setup, clone_accumulator
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

    size: int | TokenBudget  # in rows, or padded tokens
    num_micro_batches: int
    differences: dict[str, float] | None  # of gradients from those of the whole, by parameter; None where it failed
    error: float  # relative, over all parameters; NaN where it failed, infinite where a loss is not finite
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
        nodes.extend(graph_nodes(terms))
        if not any(term.requires_grad for term in terms):
            BackPropagation()([(term, 1.0) for term in terms])  # raises the error that says so
        return output

    shared = setup.shared_randomness
    recorded = RecordedRandomness() if shared is None else shared[0]
    mode = recorded if shared is None else setup.randomness_of(recorded, range(setup.num_rows))
    with setup.running():
        states = RandomStates.record(model.parameters())
        batch = setup.whole_batch()
        collate_drew = states.torch.has_moved() or states.moved_on_host() is not None
        try:
            with mode, counter_based_dropout(model, update=0, num_rows=setup.num_rows):  # as in a first window
                found, loss = full_batch_gradient(model, loss_fn, batch)
        finally:
            mode.restore_generators()
        drew = "collate" if collate_drew else states.moved_on_host()
    leaves = [leaf for leaf in map(leaf_of, nodes) if leaf is not None]
    return WholeRun(found, loss, recorded, leaves, set().union(*map(input_dtypes, nodes)), drew)


def run_in_parts(setup: Setup, size: int | TokenBudget, whole: WholeRun) -> Attempt:
    """The batch in micro-batches of at most this size, each row with the random numbers that it had in the whole."""
    model, is_joint = setup.fresh_model(), setup.batch_norm == "exact"
    with without_warnings():
        order = _order(setup, size)
        randomness = WindowRandomness(partial(setup.randomness_of, whole.recorded), order, in_turns=is_joint)
        accumulator = clone_accumulator(setup, model, randomness.around(setup.loss_fn), size)
        try:
            with setup.running(), randomness:
                accumulator.backward(setup.batch_for_accumulator())
        except Exception as error:
            is_found = isinstance(error, NonFiniteLossError if is_joint else (NonFiniteLossError, BatchNormError))
            if isinstance(error, GradfoldError) and not is_found:
                raise  # what the accumulator itself tells the user
            off = math.inf if isinstance(error, NonFiniteLossError) else math.nan
            return Attempt(size, len(order), None, off, error)
        finally:
            randomness.restore_generators()
    randomness.finish()
    found = gradients(model)  # not kept: there may be many sizes
    names = {**whole.gradients, **found}
    differences = {name: difference_norm(found.get(name), whole.gradients.get(name)) for name in names}
    distance = relative_error(found, whole.gradients)
    distance = math.inf if math.isnan(distance) else distance
    return Attempt(size, len(order), differences, distance, None, randomness.unknown, randomness.dims)


def run_on_all_ranks(
    setup: Setup, size: int | TokenBudget | None, wrap: Callable[[nn.Module], nn.Module]
) -> tuple[dict[str, Tensor], int]:
    """The gradient of the rows of all ranks, by a wrapped copy, and how many micro-batches it took on this one."""
    model = setup.fresh_model()
    with without_warnings():
        accumulator = clone_accumulator(setup, wrap(model), setup.loss_fn, size, distributed=None)
        with setup.running():
            result = accumulator.backward(setup.batch_for_accumulator())
    return gradients(unwrapped(model)), result.num_micro_batches


def _order(setup: Setup, size: int | TokenBudget) -> list[Rows]:
    """The rows of micro-batches in the order in which they are run: those of zero weight last, if at all."""
    with setup.running():
        parts = setup.micro_batches(size)
        idle = weigh(setup.accumulator.weight, parts).zero_weight
    order = [index for index in range(len(parts)) if index not in idle] + sorted(idle)
    return [parts[index].rows for index in order]
