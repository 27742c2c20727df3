"""The runs of a proof: the whole batch at once, in plain torch, and in micro-batches, by gradfold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import Batch
from gradfold.batch.rows import Rows
from gradfold.distributed.ddp import unwrapped
from gradfold.dropout.layer import counter_based_dropout
from gradfold.engine.backward import BackPropagation
from gradfold.engine.loss_terms import LossOutput
from gradfold.errors import BatchNormError, GradfoldError, NonFiniteLossError
from gradfold.packing.token_budget import TokenBudget
from gradfold.self_check.comparison import Perturbation
from gradfold.self_check.rng_replay import RecordedRandomness, SharedRandomness
from gradfold.state.rng import HostRandomState, RandomState
from gradfold.verification.reference import difference_norm, full_batch_gradient, gradients, relative_error
from gradfold.verification.rng_order import RandomnessInOrder, RandomnessInTurns
from gradfold.verification.setup import LossGraph, Setup, terms_of
from gradfold.weights import weigh

__all__: list[str] = []


@dataclass(frozen=True)
class WholeRun:
    """The whole batch at once, in plain torch.

    Attributes:
        gradients: by parameter.
        loss: its value.
        recorded: the random numbers that were drawn.
        graph: between parameters and loss.
        drew: what else was drawn from, which cannot be handed to rows: "collate", "random", "numpy.random".
    """

    gradients: dict[str, Tensor]
    loss: float
    recorded: RecordedRandomness
    graph: LossGraph
    drew: str | None


@dataclass(frozen=True)
class Attempt:
    """The batch in micro-batches, by gradfold.

    Attributes:
        size: rows of a micro-batch, at most, or a budget of padded tokens.
        num_micro_batches: how many there are.
        differences: by parameter, how far its gradient is from that of the whole; None where it failed.
        error: the same over all parameters, relative; NaN where it failed, infinite where a loss is not finite.
        failure: what the user's own functions raised, or a loss that is not finite, or BatchNorm.
        unknown: the operator whose random numbers could not be handed to rows, if any.
        dims: by number of a draw, the dimension that was taken for its rows.
    """

    size: int | TokenBudget
    num_micro_batches: int
    differences: dict[str, float] | None
    error: float
    failure: Exception | None = None
    unknown: str | None = None
    dims: Mapping[int, int] = field(default_factory=dict)


def run_whole(specimen: Setup, model: nn.Module | None = None) -> WholeRun:
    """The whole batch at once; on a copy of the model that has run before, if it is given."""
    model = specimen.fresh_model() if model is None else model
    graphs = []

    def loss_fn(model: nn.Module, batch: Batch) -> LossOutput:
        output: LossOutput = specimen.accumulator.loss_fn(model, batch)
        graphs.append(specimen.watch_loss(model, output))
        _check_grad(terms_of(output))
        return output

    recorded = RecordedRandomness() if specimen.equal_draws is None else specimen.equal_draws[0]
    mode = recorded if specimen.equal_draws is None else SharedRandomness(*specimen.equal_draws)
    with specimen.running():
        torch_state, host_state = RandomState.record(model.parameters()), HostRandomState.record()
        batch = specimen.whole_batch()
        collate_drew = torch_state.has_moved() or host_state.moved() is not None
        try:
            with mode, counter_based_dropout(model, update=0, num_rows=specimen.num_rows):  # as in a first window
                found, loss = full_batch_gradient(model, loss_fn, batch)
        finally:
            mode.restore_generators()
        drew = "collate" if collate_drew else host_state.moved()
    return WholeRun(found, loss, recorded, graphs[-1], drew)


def run_jittered(specimen: Setup, precision: torch.dtype, seed: int) -> WholeRun:
    """The whole batch at once, with all parameters off by some rounding errors of this precision."""
    model = specimen.fresh_model()
    with Perturbation(model.parameters(), seed, precision):
        return run_whole(specimen, model)


def run_in_parts(specimen: Setup, size: int | TokenBudget, whole: WholeRun) -> Attempt:
    """The batch in micro-batches of at most this size, each row with the random numbers that it had in the whole."""
    model = specimen.fresh_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        order = _order(specimen, size)
        in_order = RandomnessInTurns if specimen.batch_norm == "exact" else RandomnessInOrder
        draws = in_order(partial(specimen.draws_of, whole.recorded), order)
        twin = specimen.twin(model, draws.around(specimen.loss_fn_in_phases()), size)
        try:
            with specimen.running(), draws:
                twin.backward(specimen.batch())
        except Exception as error:
            is_joint = specimen.batch_norm == "exact"
            is_found = isinstance(error, NonFiniteLossError if is_joint else (NonFiniteLossError, BatchNormError))
            if isinstance(error, GradfoldError) and not is_found:
                raise  # what the user is told without a proof, too
            distance = math.inf if isinstance(error, NonFiniteLossError) else math.nan
            return Attempt(size, len(order), None, distance, error)
        finally:
            draws.restore_generators()
    draws.finish()
    found = gradients(model)  # not kept: there may be many sizes
    names = {**whole.gradients, **found}
    differences = {name: difference_norm(found.get(name), whole.gradients.get(name)) for name in names}
    distance = relative_error(found, whole.gradients)
    distance = math.inf if math.isnan(distance) else distance
    return Attempt(size, len(order), differences, distance, None, draws.unknown, draws.dims)


def run_with_others(
    specimen: Setup, size: int | TokenBudget | None, wrap: Callable[[nn.Module], nn.Module]
) -> tuple[dict[str, Tensor], int]:
    """The gradient of this rank's rows and those of others, and how many micro-batches it took here.

    Args:
        specimen: of this rank.
        size: of micro-batches.
        wrap: wraps a copy of the model for all ranks.
    """
    model = specimen.fresh_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = specimen.twin(wrap(model), specimen.loss_fn_in_phases(), size, ranks=None)
        with specimen.running():
            result = twin.backward(specimen.batch())
    return gradients(unwrapped(model)), result.num_micro_batches


def _order(specimen: Setup, size: int | TokenBudget) -> list[Rows]:
    """The rows of micro-batches in the order in which they are run: those that weigh nothing last, if at all."""
    with specimen.running():
        parts = specimen.micro_batches(size)
        idle = weigh(specimen.accumulator.weight, parts).idle()
    order = [index for index in range(len(parts)) if index not in idle] + sorted(idle)
    return [parts[index].rows for index in order]


def _check_grad(terms: Mapping[str, Tensor]) -> None:
    if not any(term.requires_grad for term in terms.values()):
        BackPropagation()([(term, 1.0) for term in terms.values()])  # says what is wrong
