"""The statistics of a window: what `statistic(model, micro_batch)` returned, over all micro-batches and ranks.

The loss caches its gradient in their `.grad`, and the recompute pass reads each micro-batch's part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, leaves_by_path, map_leaves, map_tensors
from gradfold.distributed.agreement import digest, is_common
from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.engine.backward import Weighed
from gradfold.engine.coordinator import Coordinator
from gradfold.errors import LossError
from gradfold.messages import warn
from gradfold.twophase.loss import Combine, has_gradient

_MAX_SAMPLE = 4096  # elements of a sum that are kept of each micro-batch, to see whether they are reproduced

Leaves: TypeAlias = "dict[str, Any]"
"""Statistics by the path that leads to them; a single one is "S"."""


class Statistics:
    """Filled micro-batch by micro-batch, then joined with those of other ranks."""

    def __init__(self, combine: Combine, differentiable: frozenset[str] = frozenset()) -> None:
        self._combine = combine
        self.differentiable = differentiable  # paths of those known to have a gradient, on all ranks once joined
        self.missed: set[str] = set()  # paths of those found to have one in the recompute pass only
        self._template: Batch = None
        self._paths: list[str] | None = None
        self._parts: dict[int, Leaves] = {}  # by micro-batch; of sums, samples of their elements
        self._sums: Leaves = {}
        self._dtypes: dict[str, torch.dtype] = {}  # of sums
        self._leaves: Leaves = {}  # of the whole batch
        self._rows: dict[int, dict[str, slice]] = {}  # by micro-batch, where its rows are in each leaf; none of sums
        self.deviations: dict[int, Tensor] = {}  # relative, of the second run of each micro-batch

    def add(self, index: int, output: Batch, num_rows: int) -> None:
        """Add those of a micro-batch; LossError where they cannot be combined."""
        is_first = self._paths is None
        found = self._by_path(index, output)
        self.differentiable |= {path for path, leaf in found.items() if has_gradient(leaf)}
        leaves = map_tensors(_own, found)
        if is_first:
            self._template = map_leaves(lambda leaf: None, output)
            for path, leaf in leaves.items():
                _check_leaf(path, leaf, self._combine)
        if self._combine == "concatenate":
            _warn_of_counts(leaves, num_rows)
            self._parts[index] = leaves
            return
        self._parts[index] = map_tensors(_sample, leaves)
        self._dtypes = {path: leaf.dtype for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
        wide = map_tensors(_widened, leaves)
        self._sums = wide if is_first else {path: _plus(self._sums[path], leaf, path) for path, leaf in wide.items()}

    def join(self, coordinator: Coordinator) -> None:
        """Combine, over all ranks in their order; every rank must take part."""
        own = self._sums
        if self._combine == "concatenate":
            own = {path: _concatenated(path, self._parts) for path in self._paths or ()}
        described = map_tensors(lambda leaf: leaf.to("meta"), own)  # shape and dtype alone
        of_all: Sequence[Leaves] = [described] * coordinator.num_ranks
        text = repr(([(path, _shown(leaf)) for path, leaf in described.items()], sorted(self.differentiable)))
        if not is_common(coordinator.meet(digest(text.encode())), coordinator.num_ranks):
            of_all, differentiable = zip(*coordinator.exchange((described, self.differentiable)), strict=True)
            _check_alike(of_all, self._combine)
            self.differentiable = self.differentiable.union(*differentiable)
        if coordinator.num_ranks > 1:
            assert isinstance(coordinator, DataParallelCoordinator)
            own = (_gathered if self._combine == "concatenate" else _summed)(coordinator, own, of_all)
        if self._combine == "concatenate":
            before = of_all[: coordinator.rank]
            self._place({path: sum(_num_rows(leaves[path]) for leaves in before) for path in own})
        else:
            own = {path: leaf.to(self._dtypes[path]) if path in self._dtypes else leaf for path, leaf in own.items()}
        for path, leaf in own.items():
            if path in self.differentiable and isinstance(leaf, Tensor):
                leaf.requires_grad_()
        self._leaves = own

    def for_loss(self) -> Batch:
        """The statistics of the whole batch, as `statistic` returned them; a loss may write to its labels."""
        own = map_tensors(lambda leaf: leaf if leaf.requires_grad else leaf.clone(), self._leaves)
        leaves = iter(own.values())
        return map_leaves(lambda leaf: next(leaves), self._template)

    def tensors(self) -> list[Tensor]:
        """Those of the whole batch, with their cached gradients."""
        return [leaf for leaf in self._leaves.values() if isinstance(leaf, Tensor)]

    def weigh(self, index: int, output: Batch) -> Weighed:
        """The statistics of a micro-batch, with their graph, each with its part of the cached gradient."""
        weighed = []
        for path, leaf in self._by_path(index, output).items():
            whole = self._leaves[path]
            if not has_gradient(leaf):
                continue
            if not whole.requires_grad:
                self.missed.add(path)
            elif whole.grad is not None:
                # A copy: through views alone, autograd would make this memory a parameter's .grad, and add to it.
                weighed.append((leaf, self._part(index, path, whole.grad).clone()))
        return weighed

    @torch.no_grad()
    def compare(self, index: int, output: Batch) -> None:
        """Note how far the second run of a micro-batch is from the first, without waiting for the device.

        Infinite where labels differ; NaN where a statistic is not finite, which is reported elsewhere.
        """
        found = []
        for path, leaf in self._by_path(index, output).items():
            if not isinstance(leaf, Tensor):
                continue
            before = self._before(index, path)
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
        tensors = [path for path, leaf in self._leaves.items() if isinstance(leaf, Tensor)]
        for index in self._rows or self._parts:
            if not all(bool(self._before(index, path).isfinite().all()) for path in tensors):
                return index
        return None

    def _by_path(self, index: int, output: Batch) -> Leaves:
        """What a micro-batch gave; LossError where it is another nesting than the first one's."""
        leaves = {path or "S": leaf for path, leaf in leaves_by_path(output)}
        if self._paths is None:
            self._paths = list(leaves)
        if [*leaves] != self._paths:
            named = [["a tensor" if path == "S" else path for path in paths] for paths in (leaves, self._paths)]
            now, before = (", ".join(paths) or "nothing" for paths in named)
            raise LossError(
                f"statistic returned {now} for micro-batch {index}, and {before} for another. Return the same nesting "
                "every time."
            )
        return leaves

    def _before(self, index: int, path: str) -> Tensor:
        """What the embed pass gave for a micro-batch; of sums, a sample."""
        kept: Tensor = self._leaves[path].detach() if self._rows else self._parts[index][path]
        return self._part(index, path, kept)

    def _part(self, index: int, path: str, whole: Tensor) -> Tensor:
        """A micro-batch's part of a leaf: its rows, or all of a sum."""
        return whole[self._rows[index][path]] if self._rows else whole

    def _place(self, starts: Mapping[str, int]) -> None:
        """Note where the rows of each micro-batch are, and free its own copy of them."""
        for index, leaves in self._parts.items():
            stops = {path: starts[path] + _num_rows(leaf) for path, leaf in leaves.items()}
            self._rows[index] = {path: slice(starts[path], stop) for path, stop in stops.items()}
            starts = stops
        self._parts.clear()


def _own(leaf: Tensor) -> Tensor:
    """A statistic without its graph, and without the larger tensor of which it may be a view."""
    leaf = leaf.detach()
    is_view = leaf.layout is torch.strided and leaf.untyped_storage().nbytes() > leaf.numel() * leaf.itemsize
    return leaf.clone() if is_view else leaf


def _warn_of_counts(leaves: Leaves, num_rows: int) -> None:
    """Warn of a number equal to the micro-batch's rows: if it counts them, it is wrong for the batch."""
    for path, leaf in leaves.items():
        if type(leaf) is int and leaf == num_rows > 1:
            warn(
                f"the statistic {path} is {leaf}, which is the number of rows of a micro-batch. If that is what it "
                "means, loss(model, statistics) takes it for that of the batch: count the rows of another statistic "
                "there, len(...)."
            )


def _sample(leaf: Tensor) -> Tensor:
    """Some elements, evenly spaced."""
    values = leaf.detach().reshape(-1)
    return values[:: max(1, -(-len(values) // _MAX_SAMPLE))].clone()


def _widened(leaf: Tensor) -> Tensor:
    """A copy in the dtype of sums: float32 at least, to be rounded once."""
    return leaf.to(torch.float32) if leaf.is_floating_point() and leaf.itemsize < 4 else leaf.clone()


def _num_rows(leaf: Any) -> int:
    return len(leaf) if isinstance(leaf, Tensor) else 0


def _check_leaf(path: str, leaf: Any, combine: Combine) -> None:
    """Raise LossError where a statistic cannot be combined at all."""
    if isinstance(leaf, Tensor):
        if leaf.layout is not torch.strided:
            raise LossError(f"the statistic {path} is a {leaf.layout} tensor; expected a dense one.")
        if combine == "concatenate" and leaf.dim() == 0:
            raise LossError(
                f"the statistic {path} is a 0-d tensor, which has no rows to concatenate. Return one entry per row, or "
                'sums over rows with TwoPhaseLoss(..., combine="sum").'
            )
        if combine == "sum" and leaf.dtype == torch.bool:
            raise LossError(f"the statistic {path} is a bool tensor, which cannot be summed: write .long() for it.")
    elif leaf is not None and not isinstance(leaf, (bool, int, float, str)):
        raise LossError(f"the statistic {path} is a {type(leaf).__name__}; expected a tensor, a number or text.")


def _concatenated(path: str, parts: Mapping[int, Leaves]) -> Any:
    """The rows of all micro-batches; LossError where they do not fit."""
    column = [leaves[path] for leaves in parts.values()]
    if not any(isinstance(leaf, Tensor) for leaf in column):
        return _same(column, path)
    for index, leaf in zip(parts, column, strict=True):
        if not isinstance(leaf, Tensor) or leaf.dtype != column[0].dtype or leaf.shape[1:] != column[0].shape[1:]:
            raise LossError(
                f"the statistic {path} is {_shown(leaf)} in micro-batch {index}, and {_shown(column[0])} in another; "
                "expected the same but for the number of rows. Pad to one length, or take a mean over it."
            )
    return torch.cat(column)


def _check_alike(of_all: Sequence[Leaves], combine: Combine) -> None:
    """Raise LossError, on all ranks, where their statistics differ in paths, shapes without the rows, or dtypes."""
    forms = [
        ", ".join(f"{path}: {_form(leaf, combine)}" for path, leaf in leaves.items()) or "nothing" for leaves in of_all
    ]
    for rank, form in enumerate(forms):
        if form != forms[0]:
            raise LossError(
                f"the statistics of rank {rank} ({form}) cannot be combined with those of rank 0 ({forms[0]})."
            )


def _form(leaf: Any, combine: Combine) -> str:
    if not isinstance(leaf, Tensor):
        return "not a tensor"
    return f"{tuple(leaf.shape[1:] if combine == 'concatenate' else leaf.shape)} {leaf.dtype}"


def _gathered(coordinator: DataParallelCoordinator, own: Leaves, of_all: Sequence[Leaves]) -> Leaves:
    """The rows of all ranks."""
    whole = dict(own)
    counts = {path: [_num_rows(leaves[path]) for leaves in of_all] for path in own}
    for path, leaf in own.items():
        if isinstance(leaf, Tensor):
            whole[path] = leaf.new_empty((sum(counts[path]), *leaf.shape[1:]))
            whole[path].narrow(0, sum(counts[path][: coordinator.rank]), len(leaf)).copy_(leaf)
        else:
            whole[path] = _same([leaves[path] for leaves in of_all], path)
    coordinator.meet()  # all have the memory; from here on the others wait
    for path, leaf in whole.items():
        if isinstance(leaf, Tensor):
            coordinator.group.broadcast_rows(leaf, counts[path])
    return whole


def _summed(coordinator: DataParallelCoordinator, own: Leaves, of_all: Sequence[Leaves]) -> Leaves:
    """The sums over all ranks."""
    whole = dict(own)
    for path, leaf in own.items():
        if isinstance(leaf, Tensor):
            coordinator.group.all_reduce(leaf)
        else:
            whole[path] = reduce(partial(_plus, path=path), [leaves[path] for leaves in of_all])
    return whole


def _plus(total: Any, leaf: Any, path: str) -> Any:
    """The sum of two statistics, in the memory of the first; LossError where they cannot be summed."""
    if isinstance(total, Tensor) and isinstance(leaf, Tensor):
        if total.shape != leaf.shape:
            raise LossError(
                f"the statistic {path} has shape {tuple(leaf.shape)} in one micro-batch and "
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
                f"the statistic {path} is {_shown(first)} in one micro-batch and {_shown(other)} in another; "
                "only tensors are combined."
            )
    return first


def _shown(leaf: Any) -> str:
    return f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, Tensor) else repr(leaf)
