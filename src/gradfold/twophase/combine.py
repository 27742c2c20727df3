"""How statistics are combined over micro-batches and over ranks, which first describe theirs to each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.errors import LossError
from gradfold.twophase.loss import Combine


@dataclass(frozen=True)
class LocalStatistics:
    """What other ranks are told of the statistics of one rank."""

    paths: list[str]
    leaves: list[Any]  # tensors on the meta device: shape and dtype alone
    differentiable: frozenset[str]  # paths of those that are known to have a gradient

    def form(self, combine: Combine) -> str:
        """What must be the same on all ranks: paths, shapes without the rows, dtypes."""
        first = 1 if combine == "concatenate" else 0
        forms = [
            f"{tuple(leaf.shape[first:])} {leaf.dtype}" if isinstance(leaf, Tensor) else "not a tensor"
            for leaf in self.leaves
        ]
        return ", ".join(f"{path or 'S'}: {form}" for path, form in zip(self.paths, forms, strict=True)) or "nothing"


def num_rows(leaf: Any) -> int:
    """The rows of a leaf that is to be concatenated."""
    return len(leaf) if isinstance(leaf, Tensor) else 0


def check_leaf(path: str, leaf: Any, combine: Combine) -> None:
    """Raise LossError where a statistic cannot be combined at all."""
    name = path or "S"
    if isinstance(leaf, Tensor):
        if leaf.layout is not torch.strided:
            raise LossError(f"the statistic {name} is a {leaf.layout} tensor; expected a dense one.")
        if combine == "concatenate" and leaf.dim() == 0:
            raise LossError(
                f"the statistic {name} is a 0-d tensor, which has no rows to concatenate. Return one entry per row, or "
                'sums over rows with TwoPhaseLoss(..., combine="sum").'
            )
        if combine == "sum" and leaf.dtype == torch.bool:
            raise LossError(f"the statistic {name} is a bool tensor, which cannot be summed: write .long() for it.")
    elif leaf is not None and not isinstance(leaf, (bool, int, float, str)):
        raise LossError(f"the statistic {name} is a {type(leaf).__name__}; expected a tensor, a number or text.")


def concatenate(column: Sequence[Any], path: str, indices: Iterable[int]) -> Any:
    """The rows of all micro-batches; LossError where they do not fit."""
    if not any(isinstance(leaf, Tensor) for leaf in column):
        return _same(column, path)
    for index, leaf in zip(indices, column, strict=True):
        if not isinstance(leaf, Tensor) or leaf.dtype != column[0].dtype or leaf.shape[1:] != column[0].shape[1:]:
            raise LossError(
                f"the statistic {path or 'S'} is {_shown(leaf)} in micro-batch {index}, and {_shown(column[0])} in "
                "another; expected the same but for the number of rows. Pad to one length, or take a mean over it."
            )
    return torch.cat(list(column))


def check_alike(of_all: Sequence[LocalStatistics], combine: Combine) -> None:
    """Raise LossError, on all ranks, where their statistics cannot be combined."""
    forms = [one.form(combine) for one in of_all]
    for rank, form in enumerate(forms):
        if form != forms[0]:
            raise LossError(
                f"the statistics of rank {rank} ({form}) cannot be combined with those of rank 0 ({forms[0]})."
            )


def gather(coordinator: DataParallelCoordinator, own: Sequence[Any], of_all: Sequence[LocalStatistics]) -> list[Any]:
    """The rows of all ranks."""
    rank, whole, counts = coordinator.group.rank, list(own), []
    for number, leaf in enumerate(own):
        counts.append([num_rows(one.leaves[number]) for one in of_all])
        if isinstance(leaf, Tensor):
            whole[number] = leaf.new_empty((sum(counts[number]), *leaf.shape[1:]))
            whole[number].narrow(0, sum(counts[number][:rank]), len(leaf)).copy_(leaf)
        else:
            whole[number] = _same([one.leaves[number] for one in of_all], of_all[0].paths[number])
    coordinator.exchange(None)  # all have the memory; from here on the others wait
    for leaf, of_ranks in zip(whole, counts, strict=True):
        if isinstance(leaf, Tensor):
            coordinator.group.broadcast_rows(leaf, of_ranks)
    return whole


def sum_over_ranks(
    coordinator: DataParallelCoordinator, own: Sequence[Any], of_all: Sequence[LocalStatistics]
) -> list[Any]:
    """The sums over all ranks."""
    whole = list(own)
    for number, leaf in enumerate(own):
        if isinstance(leaf, Tensor):
            coordinator.group.all_reduce(leaf)
        else:
            whole[number] = reduce(partial(plus, path=of_all[0].paths[number]), [one.leaves[number] for one in of_all])
    return whole


def plus(total: Any, leaf: Any, path: str) -> Any:
    """The sum of two statistics, in the memory of the first; LossError where they cannot be summed."""
    if isinstance(total, Tensor) and isinstance(leaf, Tensor):
        if total.shape != leaf.shape:
            raise LossError(
                f"the statistic {path or 'S'} has shape {tuple(leaf.shape)} in one micro-batch and "
                f'{tuple(total.shape)} in another, which cannot be summed. For rows, write combine="concatenate".'
            )
        return total.add_(leaf)
    if isinstance(total, (int, float)) and isinstance(leaf, (int, float)) and not isinstance(total, bool):
        return total + leaf
    return _same([total, leaf], path)


def _same(values: Sequence[Any], path: str) -> Any:
    """The one value of something that cannot be combined; LossError where there are several."""
    first = values[0]
    for other in values[1:]:
        if isinstance(first, Tensor) or isinstance(other, Tensor) or first != other:
            raise LossError(
                f"the statistic {path or 'S'} is {_shown(first)} in one micro-batch and {_shown(other)} in another; "
                "only tensors are combined."
            )
    return first


def _shown(leaf: Any) -> str:
    return f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)
