"""The statistics of a window: what `statistic(model, micro_batch)` returned, over all micro-batches and ranks.

The loss caches its gradient in their `.grad`, and the recompute pass reads each micro-batch's part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, every_leaf, leaves_by_path, map_leaves, map_tensors
from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.engine.backward import Weighed
from gradfold.engine.coordinator import Coordinator
from gradfold.errors import LossError
from gradfold.messages import warn
from gradfold.twophase import combine as rules
from gradfold.twophase.loss import Combine, has_gradient

_MAX_SAMPLE = 4096  # elements of a sum that are kept of each micro-batch, to see whether they are reproduced


class Statistics:
    """Filled micro-batch by micro-batch, then joined with those of other ranks."""

    def __init__(self, combine: Combine, differentiable: frozenset[str] = frozenset()) -> None:
        self._combine = combine
        self.differentiable = differentiable  # paths of those known to have a gradient, on all ranks once joined
        self.missed: set[str] = set()  # paths of those found to have one in the recompute pass only
        self._template: Batch = None
        self._paths: list[str] = []
        self._parts: dict[int, list[Any]] = {}  # by micro-batch; of sums, samples of their elements
        self._sums: list[Any] = []
        self._dtypes: list[torch.dtype | None] = []  # of sums
        self._leaves: list[Any] = []  # of the whole batch
        self._rows: dict[int, list[slice]] = {}  # by micro-batch, where its rows are in each leaf; none of sums
        self.deviations: dict[int, Tensor] = {}  # relative, of the second run of each micro-batch

    def add(self, index: int, output: Batch, num_rows: int) -> None:
        """Add those of a micro-batch; LossError where they cannot be combined."""
        found = leaves_by_path(output)
        paths = [path for path, _ in found]
        self.differentiable |= {path for path, leaf in found if has_gradient(leaf)}
        leaves = [_own(leaf) if isinstance(leaf, Tensor) else leaf for _, leaf in found]
        if not self._parts:
            self._template, self._paths = map_leaves(lambda leaf: None, output), paths
            for path, leaf in zip(paths, leaves, strict=True):
                rules.check_leaf(path, leaf, self._combine)
        elif paths != self._paths:
            now, before = (", ".join(path or "a tensor" for path in one) or "nothing" for one in (paths, self._paths))
            raise LossError(
                f"statistic returned {now} for micro-batch {index}, and {before} for another. Return the same nesting "
                "every time."
            )
        if self._combine == "concatenate":
            _warn_of_counts(leaves, paths, num_rows)
            self._parts[index] = leaves
            return
        self._parts[index] = map_tensors(_sample, leaves)
        self._dtypes = [leaf.dtype if isinstance(leaf, Tensor) else None for leaf in leaves]
        wide = map_tensors(_widened, leaves)
        self._sums = [*map(rules.plus, self._sums, wide, paths)] if self._sums else wide

    def join(self, coordinator: Coordinator) -> None:
        """Combine, over all ranks in their order; every rank must take part."""
        own = self._sums
        if self._combine == "concatenate":
            columns = zip(self._paths, zip(*self._parts.values(), strict=True), strict=True)
            own = [rules.concatenate(column, path, self._parts) for path, column in columns]
        described = map_tensors(lambda leaf: leaf.to("meta"), list(own))
        of_all = coordinator.exchange(rules.LocalStatistics(self._paths, described, self.differentiable))
        rules.check_alike(of_all, self._combine)
        self.differentiable = self.differentiable.union(*(one.differentiable for one in of_all))
        if coordinator.num_ranks > 1:
            assert isinstance(coordinator, DataParallelCoordinator)
            combine = rules.gather if self._combine == "concatenate" else rules.sum_over_ranks
            own = combine(coordinator, own, of_all)
        if self._combine == "concatenate":
            before = of_all[: coordinator.rank]
            self._place([sum(rules.num_rows(one.leaves[number]) for one in before) for number in range(len(own))])
        else:
            pairs = zip(own, self._dtypes, strict=True)
            own = [leaf if dtype is None else leaf.to(dtype) for leaf, dtype in pairs]
        for path, leaf in zip(self._paths, own, strict=True):
            if path in self.differentiable and isinstance(leaf, Tensor):
                leaf.requires_grad_()
        self._leaves = list(own)

    def for_loss(self) -> Batch:
        """The statistics of the whole batch, as `statistic` returned them; a loss may write to its labels."""
        leaves = iter(map_tensors(lambda leaf: leaf if leaf.requires_grad else leaf.clone(), self._leaves))
        return map_leaves(lambda leaf: next(leaves), self._template)

    def tensors(self) -> list[Tensor]:
        """Those of the whole batch, with their cached gradients."""
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def weigh(self, index: int, output: Batch) -> Weighed:
        """The statistics of a micro-batch, with their graph, each with its part of the cached gradient."""
        weighed = []
        for number, leaf in enumerate(every_leaf(output)):
            whole = self._leaves[number]
            if not has_gradient(leaf):
                continue
            if not whole.requires_grad:
                self.missed.add(self._paths[number])
            elif whole.grad is not None:
                # A copy: through views alone, autograd would make this memory a parameter's .grad, and add to it.
                weighed.append((leaf, self._part(index, number, whole.grad).clone()))
        return weighed

    @torch.no_grad()
    def compare(self, index: int, output: Batch) -> None:
        """Note how far the second run of a micro-batch is from the first, without waiting for the device.

        Infinite where labels differ; NaN where a statistic is not finite, which is reported elsewhere.
        """
        found = []
        for number, leaf in enumerate(every_leaf(output)):
            if not isinstance(leaf, Tensor):
                continue
            before = self._before(index, number)
            now = leaf.detach() if self._combine == "concatenate" else _sample(leaf)
            if before.shape != now.shape:
                found.append(torch.full((), torch.inf, device=leaf.device, dtype=torch.float64))
            elif leaf.is_floating_point() or leaf.is_complex():
                size = torch.linalg.vector_norm(before).double().clamp(min=torch.finfo(torch.float32).tiny)
                found.append(torch.linalg.vector_norm(now - before).double() / size)
            else:
                found.append(torch.where((now != before).any(), torch.inf, 0.0).double())
        if found:  # each by itself: a small statistic that has changed would not be seen among large ones
            self.deviations[index] = torch.stack([one.to(found[0].device) for one in found]).max()

    def first_non_finite(self) -> int | None:
        """The first micro-batch of this rank whose statistics are not all finite."""
        tensors = [number for number, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        for index in self._rows or self._parts:
            if not all(bool(self._before(index, number).isfinite().all()) for number in tensors):
                return index
        return None

    def _before(self, index: int, number: int) -> Tensor:
        """What the embed pass gave for a micro-batch; of sums, a sample."""
        kept: Tensor = self._leaves[number].detach() if self._rows else self._parts[index][number]
        return self._part(index, number, kept)

    def _part(self, index: int, number: int, whole: Tensor) -> Tensor:
        """A micro-batch's part of a leaf: its rows, or all of a sum."""
        return whole[self._rows[index][number]] if self._rows else whole

    def _place(self, starts: Sequence[int]) -> None:
        """Note where the rows of each micro-batch are, and free its own copy of them."""
        for index, leaves in self._parts.items():
            stops = [at + rules.num_rows(leaf) for at, leaf in zip(starts, leaves, strict=True)]
            self._rows[index] = list(map(slice, starts, stops))
            starts = stops
        self._parts.clear()


def _own(leaf: Tensor) -> Tensor:
    """A statistic without its graph, and without the larger tensor of which it may be a view."""
    leaf = leaf.detach()
    is_view = leaf.layout is torch.strided and leaf.untyped_storage().nbytes() > leaf.numel() * leaf.itemsize
    return leaf.clone() if is_view else leaf


def _warn_of_counts(leaves: Sequence[Any], paths: Sequence[str], num_rows: int) -> None:
    """Warn of a number equal to the micro-batch's rows: if it counts them, it is wrong for the batch."""
    for leaf, path in zip(leaves, paths, strict=True):
        if type(leaf) is int and leaf == num_rows > 1:
            warn(
                f"the statistic {path or 'S'} is {leaf}, which is the number of rows of a micro-batch. If that is what "
                "it means, loss(model, statistics) takes it for that of the batch: count the rows of another statistic "
                "there, len(...)."
            )


def _sample(leaf: Tensor) -> Tensor:
    """Some elements, evenly spaced."""
    values = leaf.detach().reshape(-1)
    return values[:: max(1, -(-len(values) // _MAX_SAMPLE))].clone()


def _widened(leaf: Tensor) -> Tensor:
    """A copy in the dtype of sums: float32 at least, to be rounded once."""
    return leaf.to(torch.float32) if leaf.is_floating_point() and leaf.itemsize < 4 else leaf.clone()
