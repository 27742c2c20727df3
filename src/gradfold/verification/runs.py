"""The runs of a proof: what the whole batch gave at once, and what came of micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from gradfold.draws import RecordedDraws
from gradfold.token_budget import TokenBudget
from gradfold.verification.graph import Graph

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
    recorded: RecordedDraws
    graph: Graph
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
