"""A gathering: the statistics of all ranks put together, agreed upon before anything is sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gradfold.agreement import Together
from gradfold.coupled.two_phase import Combine
from gradfold.errors import LossError

__all__: list[str] = []


@dataclass(frozen=True)
class Contribution:
    """What a rank tells the others of its own statistics, before tensors are sent."""

    paths: list[str]
    shapes: list[tuple[int, ...] | None]  # None for numbers and text
    dtypes: list[torch.dtype | None]
    values: list[Any]
    num_samples: int
    differentiable: frozenset[str]  # paths of those that are known to have a gradient


def listed(paths: Sequence[str]) -> str:
    """Places in a nesting, for a message."""
    return ", ".join(path or "a tensor" for path in paths) or "nothing"


def check_alike(of_all: Sequence[Contribution], combine: Combine) -> None:
    """Raise LossError, on all ranks, where their statistics do not go together."""
    first = 1 if combine == "concatenate" else 0
    forms = [
        (one.paths, one.dtypes, [None if shape is None else shape[first:] for shape in one.shapes]) for one in of_all
    ]
    for rank, form in enumerate(forms):
        if form != forms[0]:
            raise LossError(
                f"the statistics of rank {rank} ({listed(form[0])}: {form[2]}, {form[1]}) do not go with those of "
                f"rank 0 ({listed(forms[0][0])}: {forms[0][2]}, {forms[0][1]})."
            )


def gathered(agreement: Together, own: Sequence[Any], of_all: Sequence[Contribution]) -> tuple[list[Any], list[int]]:
    """The rows of all ranks, and where those of this one begin in each leaf."""
    rank = agreement.ranks.rank
    counts = [
        [0 if one.shapes[number] is None else one.shapes[number][0] for one in of_all]  # type: ignore[index]
        for number in range(len(own))
    ]
    whole: list[Any] = []
    for number, leaf in enumerate(own):
        if isinstance(leaf, Tensor):
            rows = leaf.new_empty((sum(counts[number]), *leaf.shape[1:]))
            start = sum(counts[number][:rank])
            rows[start : start + len(leaf)] = leaf
            whole.append(rows)
        else:
            for one in of_all:
                same(leaf, one.values[number], one.paths[number])
            whole.append(leaf)
    agreement.share(None)  # all have the memory; from here on the others wait
    for number, leaf in enumerate(whole):
        if isinstance(leaf, Tensor):
            agreement.ranks.fill_in(leaf, counts[number])
    return whole, [list(accumulate(of_leaf, initial=0))[rank] for of_leaf in counts]


def summed(agreement: Together, own: Sequence[Any], of_all: Sequence[Contribution]) -> list[Any]:
    """The sums of all ranks."""
    whole: list[Any] = []
    for number, leaf in enumerate(own):
        if isinstance(leaf, Tensor):
            agreement.ranks.add_up(leaf)
            whole.append(leaf)
            continue
        total = of_all[0].values[number]
        for one in of_all[1:]:
            total = plus(total, one.values[number], one.paths[number])
        whole.append(total)
    return whole


def plus(total: Any, leaf: Any, path: str) -> Any:
    """The sum of two statistics, in the memory of the first; LossError where they cannot be added."""
    if isinstance(total, Tensor) and isinstance(leaf, Tensor):
        if total.shape != leaf.shape:
            raise LossError(
                f"the statistic {path or 'S'} has shape {tuple(leaf.shape)} in one micro-batch and "
                f'{tuple(total.shape)} in another, which cannot be added up. For rows, write combine="concatenate".'
            )
        return total.add_(leaf)
    if isinstance(total, (int, float)) and isinstance(leaf, (int, float)) and not isinstance(total, bool):
        return total + leaf
    return same(total, leaf, path)


def same(one: Any, other: Any, path: str) -> Any:
    """What is not combined; LossError where it differs."""
    if isinstance(one, Tensor) or isinstance(other, Tensor) or one != other:
        raise LossError(
            f"the statistic {path or 'S'} is {_kind(one)} in one micro-batch and {_kind(other)} in another; only "
            "tensors are combined."
        )
    return one


def _kind(leaf: Any) -> str:
    return "a tensor" if isinstance(leaf, Tensor) else repr(leaf)
