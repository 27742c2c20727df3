"""Objects that know their rows: nested tensors, packed sequences, batches of graphs, and classes that can be sliced.

They are cut and joined by their own means, since rebuilt from their tensors they would lose what else they know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from gradfold.errors import BatchError

Memo = dict[Any, Any]
"""What parts of one cut share."""


class RowKeeper(Protocol):
    """How a kind of object is counted, cut and joined."""

    def count(self, node: Any) -> int | None:
        """Its rows; None where it has none after all."""

    def take(self, node: Any, rows: Sequence[int], memo: Memo) -> Any:
        """An object of the same kind with these rows, at least one."""

    def join(self, nodes: Sequence[Any], memo: Memo) -> Any:
        """Several as one."""


class _Jagged:
    """Nested tensors with `layout=torch.jagged`: those that shared their lengths share them again."""

    def count(self, node: Any) -> int | None:
        is_plain = node.lengths() is None and tuple(node.shape[2:]) == tuple(node.values().shape[1:])
        return node.size(0) if is_plain else None

    def take(self, node: Any, rows: Sequence[int], memo: Memo) -> Tensor:
        offsets: Tensor = node.offsets()
        key = id(offsets), tuple(rows)
        if key not in memo:
            memo[key] = _Pieces(offsets, rows)
        return torch.nested.nested_tensor_from_jagged(memo[key].of(node.values()), memo[key].offsets)

    def join(self, nodes: Sequence[Any], memo: Memo) -> Tensor:
        every = [node.offsets() for node in nodes]
        key = tuple(map(id, every))
        if key not in memo:
            lengths = torch.cat([offsets.diff() for offsets in every])
            memo[key] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        values: list[Tensor] = [node.values() for node in nodes]
        return torch.nested.nested_tensor_from_jagged(torch.cat(values), memo[key])


class _Pieces:
    """Some rows of jagged values: where they begin, and their own offsets."""

    def __init__(self, offsets: Tensor, rows: Sequence[int]) -> None:
        bounds = offsets.tolist()
        self._source = offsets  # kept, since it is known by its id
        lengths = [bounds[row + 1] - bounds[row] for row in rows]
        self.offsets = offsets.new_tensor([0, *accumulate(lengths)])
        self._starts, self._lengths, self._end = [bounds[row] for row in rows], lengths, bounds[-1]
        self._is_run = list(rows) == list(range(rows[0], rows[0] + len(rows)))

    def of(self, values: Tensor) -> Tensor:
        """A view where rows follow each other, as `cutting.cut_rows` makes them; else a copy."""
        if self._is_run:
            start, size = self._starts[0], sum(self._lengths)
            return torch.unsafe_split_with_sizes(values, [start, size, len(values) - start - size])[1]
        runs = zip(self._starts, self._lengths, strict=True)
        return torch.cat([values[start : start + length] for start, length in runs])


class _Nested:
    """Nested tensors of the older layout."""

    def count(self, node: Tensor) -> int | None:
        return node.size(0)

    def take(self, node: Tensor, rows: Sequence[int], memo: Memo) -> Tensor:
        parts = node.unbind()
        return torch.nested.as_nested_tensor([parts[row] for row in rows], layout=torch.strided)

    def join(self, nodes: Sequence[Tensor], memo: Memo) -> Tensor:
        return torch.nested.as_nested_tensor([part for node in nodes for part in node.unbind()], layout=torch.strided)


class _PackedSequences:
    def count(self, node: PackedSequence) -> int | None:
        return int(node.batch_sizes[0])

    def take(self, node: PackedSequence, rows: Sequence[int], memo: Memo) -> PackedSequence:
        parts = unpack_sequence(node)
        return pack_sequence([parts[row] for row in rows], enforce_sorted=node.sorted_indices is None)

    def join(self, nodes: Sequence[PackedSequence], memo: Memo) -> PackedSequence:
        is_sorted = all(node.sorted_indices is None for node in nodes)
        return pack_sequence([part for node in nodes for part in unpack_sequence(node)], enforce_sorted=is_sorted)


class _Graphs:
    """Batches of graphs with `from_data_list` and `to_data_list`, as torch_geometric has them."""

    def count(self, node: Any) -> int | None:
        return int(node.num_graphs)

    def take(self, node: Any, rows: Sequence[int], memo: Memo) -> Any:
        graphs = node.to_data_list()
        return _batch_class(type(node)).from_data_list([graphs[row] for row in rows])

    def join(self, nodes: Sequence[Any], memo: Memo) -> Any:
        return _batch_class(type(nodes[0])).from_data_list([graph for node in nodes for graph in node.to_data_list()])


def _batch_class(kind: type) -> Any:
    """The class that defines `from_data_list`: the type of a batch may be made of it and of that of its graphs."""
    return next(one for one in kind.__mro__ if "from_data_list" in vars(one))


class _Sliceable:
    """Objects with `len()` rows whose slices are of their own kind, and that move by `to`: a TensorDict, say."""

    def count(self, node: Any) -> int | None:
        try:
            size = len(node)
            if not size:
                return None if isinstance(node, Mapping) else 0  # a mapping may have tensors with rows all the same
            return size if self._is_part(node[0:1], node, 1) else None
        except Exception:  # the class's own
            return None

    def take(self, node: Any, rows: Sequence[int], memo: Memo) -> Any:
        is_run = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        try:
            part = node[rows[0] : rows[0] + len(rows)] if is_run else node[list(rows)]
        except Exception as error:
            raise BatchError(
                f"a {type(node).__name__} gives no rows {list(rows)} by its own [...] ({error})"
            ) from error
        if not self._is_part(part, node, len(rows)):
            raise BatchError(f"a {type(node).__name__} does not give {len(rows)} rows by its own [...]")
        return part

    def join(self, nodes: Sequence[Any], memo: Memo) -> Any:
        size = sum(map(len, nodes))
        try:
            joined: Any = torch.cat(list(nodes))
        except Exception as error:
            raise BatchError(f"a {type(nodes[0]).__name__} cannot be joined ({error})") from error
        if not self._is_part(joined, nodes[0], size):
            raise BatchError(f"a {type(nodes[0]).__name__} cannot be joined by torch.cat")
        return joined

    def _is_part(self, part: object, node: object, size: int) -> bool:
        return type(part) is type(node) and len(part) == size  # type: ignore[arg-type]


_JAGGED, _NESTED, _PACKED, _GRAPHS, _SLICEABLE = _Jagged(), _Nested(), _PackedSequences(), _Graphs(), _Sliceable()

_known: WeakKeyDictionary[type, RowKeeper | None] = WeakKeyDictionary()


def keeper_of(node: object) -> RowKeeper | None:
    """How an object's own rows are counted and cut; None for plain tensors and for what has none."""
    if isinstance(node, Tensor):
        if not node.is_nested:
            return None
        return _JAGGED if node.layout is torch.jagged else _NESTED
    return keeper_of_kind(type(node))


def keeper_of_kind(kind: type) -> RowKeeper | None:
    """How objects of a class other than Tensor are counted and cut; it is asked for in every window."""
    if kind not in _known:
        _known[kind] = _find_keeper(kind)
    return _known[kind]


def _find_keeper(kind: type) -> RowKeeper | None:
    if issubclass(kind, PackedSequence):
        return _PACKED
    if issubclass(kind, (Tensor, nn.Module)) or kind in (tuple, list, dict):
        return None
    if all(hasattr(kind, name) for name in ("from_data_list", "to_data_list", "num_graphs")):
        return _GRAPHS
    return _SLICEABLE if all(hasattr(kind, name) for name in ("__getitem__", "__len__", "to")) else None


def own_rows(node: object) -> int | None:
    """The rows of an object that knows them; None for all others."""
    keeper = keeper_of(node)
    return None if keeper is None else keeper.count(node)


def moved_by_itself(node: Any, device: torch.device, fresh: Callable[[Any], Any]) -> Any:
    """What the object's own `to` gives, called on a copy: some change themselves, and return nothing."""
    own = fresh(node)
    try:
        moved = own.to(device, non_blocking=True)
    except TypeError:
        moved = own.to(device)
    return own if moved is None else moved
