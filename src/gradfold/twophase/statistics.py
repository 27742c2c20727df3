"""The statistics of a window: what `statistic(model, micro_batch)` gave, combined over micro-batches and ranks.

They are the inputs of the loss of a two-phase loss, and where its gradient arrives; each micro-batch finds its share of
it here.

A gathering: the statistics of all ranks put together, agreed upon before anything is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, every_leaf, leaves_by_path, map_leaves
from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.engine.backward import Weighed
from gradfold.engine.coordinator import Coordinator
from gradfold.errors import LossError
from gradfold.messages import warn
from gradfold.twophase.loss import Combine

__all__: list[str] = []


@dataclass(frozen=True)
class LocalStatistics:
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


def check_alike(of_all: Sequence[LocalStatistics], combine: Combine) -> None:
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


def gathered(
    agreement: DataParallelCoordinator, own: Sequence[Any], of_all: Sequence[LocalStatistics]
) -> tuple[list[Any], list[int]]:
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


def summed(agreement: DataParallelCoordinator, own: Sequence[Any], of_all: Sequence[LocalStatistics]) -> list[Any]:
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


_MAX_SAMPLE = 4096  # elements of a sum that are kept of each micro-batch, to see whether it comes out again


class Statistics:
    """Filled micro-batch by micro-batch, then joined with those of other ranks.

    Args:
        combine: as of `TwoPhaseLoss`.
        differentiable: paths of those that have a gradient, as far as that is known.

    Attributes:
        num_samples: of all ranks, once joined.
        first_sample: of this rank among them.
        differentiable: with those that were found while they were collected, on all ranks once joined.
        missed: paths of those that have a gradient in a replay, though nobody knew.
    """

    def __init__(self, combine: Combine, differentiable: frozenset[str] = frozenset()) -> None:
        self._combine = combine
        self.differentiable = differentiable
        self.missed: set[str] = set()
        self._template: Batch = None
        self._paths: list[str] = []
        self._parts: dict[int, list[Any]] = {}  # by micro-batch; of sums, samples of their elements
        self._sums: list[Any] = []
        self._leaves: list[Any] = []  # of the whole batch
        self._starts: dict[int, list[int]] = {}  # by micro-batch, where its rows begin in each leaf
        self.num_samples = 0
        self.first_sample = 0

    def add(self, index: int, output: Batch, num_rows: int) -> None:
        """Take what a micro-batch gave.

        Raises:
            LossError: it cannot be combined.
        """
        paths = [path for path, _ in leaves_by_path(output)]
        self.differentiable |= {path for path, leaf in leaves_by_path(output) if _requires_grad(leaf)}
        leaves = [_own(leaf) for leaf in every_leaf(output)]
        if not self._parts:
            self._template, self._paths = map_leaves(lambda leaf: None, output), paths
            for path, leaf in zip(paths, leaves, strict=True):
                _check(path, leaf, self._combine)
        elif paths != self._paths:
            raise LossError(
                f"statistic returned {listed(paths)} for micro-batch {index}, and {listed(self._paths)} for another. "
                "Return the same nesting every time."
            )
        if self._combine == "concatenate":
            _warn_of_counts(leaves, paths, num_rows)
            self._parts[index] = leaves
            return
        self._parts[index] = [_sample(leaf) for leaf in leaves]
        wide = [_widened(leaf) for leaf in leaves]
        if self._sums:
            wide = [plus(total, leaf, path) for total, leaf, path in zip(self._sums, wide, paths, strict=True)]
        self._sums = wide
        self._dtypes = [leaf.dtype if isinstance(leaf, Tensor) else None for leaf in leaves]

    def join(self, agreement: Coordinator, num_samples: int) -> None:
        """Combine, over all ranks in their order; every rank must come."""
        own = self._concatenated() if self._combine == "concatenate" else self._sums
        contribution = LocalStatistics(
            self._paths,
            [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in own],
            [leaf.dtype if isinstance(leaf, Tensor) else None for leaf in own],
            [None if isinstance(leaf, Tensor) else leaf for leaf in own],
            num_samples,
            self.differentiable,
        )
        of_all = agreement.share(contribution)
        check_alike(of_all, self._combine)
        self.differentiable = self.differentiable.union(*(one.differentiable for one in of_all))
        counts = [one.num_samples for one in of_all]
        rank = agreement.ranks.rank if isinstance(agreement, DataParallelCoordinator) else 0
        self.num_samples, self.first_sample = sum(counts), sum(counts[:rank])
        shift = [0] * len(own)
        if isinstance(agreement, DataParallelCoordinator) and self._combine == "concatenate":
            own, shift = gathered(agreement, own, of_all)
        elif isinstance(agreement, DataParallelCoordinator):
            own = summed(agreement, own, of_all)
        if self._combine == "concatenate":
            self._place(shift)
        else:
            own = [
                leaf.to(dtype) if isinstance(leaf, Tensor) else leaf
                for leaf, dtype in zip(own, self._dtypes, strict=True)
            ]
        for path, leaf in zip(self._paths, own, strict=True):
            if path in self.differentiable and isinstance(leaf, Tensor):
                leaf.requires_grad_()
        self._leaves = list(own)

    def for_loss(self) -> Batch:
        """The statistics of the whole batch, as `statistic` returned them; a loss may write to its labels."""
        leaves = iter([_own_copy(leaf) for leaf in self._leaves])
        return map_leaves(lambda leaf: next(leaves), self._template)

    def gradients(self) -> list[Tensor]:
        """What has arrived at the statistics."""
        return [leaf.grad for leaf in self._leaves if isinstance(leaf, Tensor) and leaf.grad is not None]

    def weigh(self, index: int, output: Batch) -> Weighed:
        """The statistics of a micro-batch, with their graph, each with the gradient that has arrived at it."""
        weighed = []
        for number, leaf in enumerate(every_leaf(output)):
            whole = self._leaves[number]
            if not _requires_grad(leaf):
                continue
            if not whole.requires_grad:
                self.missed.add(self._paths[number])
            elif whole.grad is not None:
                weighed.append((leaf, self._rows(index, number, leaf, whole.grad)))
        return weighed

    @torch.no_grad()
    def deviation(self, index: int, output: Batch) -> Tensor:
        """How far a micro-batch is from what it was before, relative, 0-d on the device; infinite for other labels.

        NaN where it is not finite, which is no matter of replays.
        """
        found = []
        for number, leaf in enumerate(every_leaf(output)):
            if not isinstance(leaf, Tensor):
                continue
            before = self._before(index, number, leaf)
            now = leaf.detach() if self._combine == "concatenate" else _sample(leaf)
            if before.shape != now.shape:
                found.append(torch.full((), torch.inf, device=leaf.device, dtype=torch.float64))
            elif leaf.is_floating_point() or leaf.is_complex():
                size = torch.linalg.vector_norm(before).double().clamp(min=torch.finfo(torch.float32).tiny)
                found.append(torch.linalg.vector_norm(now - before).double() / size)
            else:
                found.append(torch.where((now != before).any(), torch.inf, 0.0).double())
        if not found:
            return torch.zeros(())
        # Each by itself: among large labels a guess that has changed would not be seen.
        return torch.stack([one.to(found[0].device) for one in found]).max()

    def non_finite(self) -> list[int]:
        """The micro-batches of this rank whose statistics are not all finite."""
        found = []
        for index, parts in self._parts.items():
            leaves = parts if self._combine == "sum" else [self._before(index, n, part) for n, part in enumerate(parts)]
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if not all(bool(leaf.isfinite().all()) for leaf in tensors):
                found.append(index)
        return found

    def lowest(self) -> torch.dtype | None:
        """The dtype of the fewest digits among them; None where none is floating point."""
        dtypes = {leaf.dtype for leaf in self._leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps) if dtypes else None

    def _before(self, index: int, number: int, like: Tensor) -> Tensor:
        kept: Tensor = self._parts[index][number]
        return kept if self._combine == "sum" else self._rows(index, number, kept, self._leaves[number].detach())

    def _rows(self, index: int, number: int, own: Tensor, whole: Tensor) -> Tensor:
        """What belongs to a micro-batch's own part of a leaf: its rows, or all of a sum."""
        if self._combine == "sum":
            return whole
        return whole.narrow(0, self._starts[index][number], len(own))

    def _concatenated(self) -> list[Any]:
        columns = list(zip(*self._parts.values(), strict=True))
        return [_below(column, path, self._parts) for column, path in zip(columns, self._paths, strict=True)]

    def _place(self, shift: Sequence[int]) -> None:
        """Note where the rows of each micro-batch are, and let its own copy of them go."""
        starts = list(shift)
        for index, leaves in self._parts.items():
            self._starts[index] = list(starts)
            for number, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    starts[number] += len(leaf)
                    leaves[number] = leaf.new_empty(0).expand(len(leaf), 0)  # what is left is how many there were


def _own(leaf: Any) -> Any:
    """A statistic without its graph, and without the larger tensor of which it may be a view."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach()
    is_view = leaf.layout is torch.strided and leaf.untyped_storage().nbytes() > leaf.numel() * leaf.itemsize
    return leaf.clone() if is_view else leaf


def _warn_of_counts(leaves: Sequence[Any], paths: Sequence[str], num_rows: int) -> None:
    """Warn of a number that is as large as the micro-batch: where it counts rows, the batch has another."""
    for leaf, path in zip(leaves, paths, strict=True):
        if type(leaf) is int and leaf == num_rows > 1:
            warn(
                f"the statistic {path or 'S'} is {leaf}, which is the number of rows of a micro-batch. If that is what "
                "it means, loss(model, statistics) takes it for that of the batch: let it count the rows of another "
                "statistic there, len(...)."
            )


def _check(path: str, leaf: Any, combine: Combine) -> None:
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
            raise LossError(f"the statistic {name} is a bool tensor, which cannot be added up: write .long() for it.")
    elif leaf is not None and not isinstance(leaf, (bool, int, float, str)):
        raise LossError(f"the statistic {name} is a {type(leaf).__name__}; expected a tensor, a number or text.")


def _sample(leaf: Any) -> Any:
    """Some elements, evenly spaced."""
    if not isinstance(leaf, Tensor):
        return leaf
    values = leaf.detach().reshape(-1)
    return values[:: max(1, -(-len(values) // _MAX_SAMPLE))].clone()


def _widened(leaf: Any) -> Any:
    """What a sum is added up in: float32 at least, to be rounded once; a copy."""
    if not isinstance(leaf, Tensor):
        return leaf
    is_narrow = leaf.is_floating_point() and leaf.itemsize < 4
    return leaf.to(torch.float32) if is_narrow else leaf.clone()


def _below(column: Sequence[Any], path: str, indices: Sequence[int] | dict[int, Any]) -> Any:
    if not any(isinstance(leaf, Tensor) for leaf in column):
        for leaf in column:
            same(column[0], leaf, path)
        return column[0]
    for index, leaf in zip(indices, column, strict=True):
        if not isinstance(leaf, Tensor) or leaf.dtype != column[0].dtype or leaf.shape[1:] != column[0].shape[1:]:
            raise LossError(
                f"the statistic {path or 'S'} is {_shape(leaf)} in micro-batch {index}, and {_shape(column[0])} in "
                "another; expected the same but for the number of rows. Pad to one length, or take a mean over it."
            )
    return torch.cat(list(column))


def _shape(leaf: Any) -> str:
    return f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)


def _own_copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and not leaf.requires_grad else leaf


def _requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad
