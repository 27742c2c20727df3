"""A batch: any nesting of tuples, lists, dicts, dataclasses and named tuples around tensors that agree in dim 0.

Dim 0 counts the *rows* (samples). 0-d tensors, numbers, strings and None are the same for every row, and unchanged.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from enum import Enum
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gradfold.errors import BatchError

Batch = Any  # checked where rows are counted, since a type for "any nesting" would accept everything too

# The same for every row.
CONSTANTS = (type(None), bool, int, float, complex, str, bytes, Enum, torch.dtype, torch.device)

_FEW = 64  # numbers of a tensor that tell whether it was written to


def map_tensors(fn: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """Rebuild a nesting with `fn(tensor)` in the place of each tensor; everything else is shared, not copied."""
    return map_leaves(lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf, batch)


def in_own_containers(batch: Batch) -> Batch:
    """The same tensors in other containers, so that `batch["x"] = batch["x"] / 255` can run again on the same rows.

    All the way down; a container that cannot be made again as what it is stays.
    """
    if not _is_container(batch):
        return batch
    try:
        own = _rebuilt(in_own_containers, batch)
    except Exception:  # the user's class
        return batch
    return own if type(own) is type(batch) else batch


def map_leaves(fn: Callable[[Any], Any], batch: Batch) -> Batch:
    """Rebuild a nesting with `fn(leaf)` in the place of each tensor and of everything else that is not a container."""
    return _rebuilt(partial(map_leaves, fn), batch) if _is_container(batch) else fn(batch)


def _is_container(node: object) -> bool:
    if isinstance(node, (Tensor, PackedSequence)):  # the latter is a named tuple whose parts are not per row
        return False
    return isinstance(node, (tuple, list, Mapping)) or is_dataclass(node)


def _rebuilt(fn: Callable[[Any], Any], batch: Batch) -> Batch:
    """A container with `fn(part)` in the place of each part."""
    if isinstance(batch, (tuple, list)):
        items = [fn(item) for item in batch]
        return batch._make(items) if hasattr(batch, "_make") else type(batch)(items)
    if isinstance(batch, Mapping):
        return refilled(batch, {key: fn(value) for key, value in batch.items()})
    # A copy, not a call of the class: __post_init__ has run once and may not accept its own results.
    filled = copy.copy(batch)
    for name, value in _attributes(batch).items():
        object.__setattr__(filled, name, fn(value))
    return filled


def refilled(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """The values in a mapping of the batch's own type, where it can be made; else as a dict."""
    kind = type(batch)
    if kind is dict:
        return values
    if isinstance(batch, (OrderedDict, defaultdict, UserDict)):  # transformers' BatchEncoding is a UserDict
        filled = copy.copy(batch)
        for key, value in values.items():
            filled[key] = value
        return filled
    # A copy of any other mapping may share its contents with the user's: only its constructor is safe.
    for arguments, keywords in (((values,), {}), ((), values)):
        try:
            made: Mapping[Any, Any] = kind(*arguments, **keywords)
            if isinstance(made, dict) and vars(batch) is not batch:
                vars(made).update(vars(batch))  # what a dict subclass carries besides its keys
            if all(made[key] is value for key, value in values.items()):
                return made
        except (TypeError, KeyError, ValueError):
            continue
    return values


def _attributes(batch: Any) -> dict[str, Any]:
    """What stands in a dataclass: its fields, and what else was put into it (a mask that __post_init__ made)."""
    names = [field.name for field in dataclasses.fields(batch)]
    values = {name: getattr(batch, name) for name in names if hasattr(batch, name)}
    return values | getattr(batch, "__dict__", {})


def cut_rows(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """Cut into parts of these numbers of rows, as views; each has a copy of every 0-d tensor, which it may change."""
    cut = cache(partial(_cut, sizes=sizes))  # what a batch holds twice, its parts hold twice

    def part(index: int, leaf: Tensor) -> Tensor:
        return cut(leaf)[index]

    return [map_tensors(partial(part, index), batch) for index in range(len(sizes))]


def _cut(tensor: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    if tensor.dim() == 0:
        return [tensor.clone() for _ in sizes]
    if tensor.is_sparse:
        return [tensor.narrow_copy(0, stop - size, size) for size, stop in zip(sizes, accumulate(sizes), strict=True)]
    # Autograd knows these parts as separate tensors that share memory, so a model may change its input in
    # place, as it may with a whole batch. With slices the first such change would tie all of them to its graph.
    parts: Sequence[Tensor] = torch.unsafe_split_with_sizes(tensor, sizes)
    return parts


def take_rows(batch: Batch, rows: Sequence[int]) -> Batch:
    """A batch of these rows, copied; with a copy of every 0-d tensor, which it may change."""
    index = torch.tensor(list(rows))

    @cache  # what a batch holds twice, its parts hold twice
    def take(leaf: Tensor) -> Tensor:
        return leaf.index_select(0, index.to(leaf.device)) if leaf.dim() else leaf.clone()

    return map_tensors(take, batch)


def join_rows(batches: Sequence[Batch], takes_first: bool = False) -> Batch:
    """Batches of one nesting as one, row after row: the opposite of `cut_rows`.

    Raises:
        BatchError: they are not alike, or what is the same for every row of one is not so for all, unless it is to be
            taken from the first.
    """
    leaves = list(map(every_leaf, batches))
    if len({len(one) for one in leaves}) > 1:
        raise BatchError("batches of different structure cannot be joined")
    columns = zip(*leaves, strict=True)

    def join(first: Any) -> Any:
        column = next(columns)
        if isinstance(first, Tensor) and first.dim():
            try:
                return torch.cat(column)
            except (RuntimeError, TypeError) as error:
                raise BatchError(f"batches cannot be joined ({error})") from error
        if takes_first or all(_is_equal(first, other) for other in column):
            return first
        raise BatchError("what all rows share differs between batches, so they cannot be joined")

    return map_leaves(join, batches[0])


def rows_if_any(batch: Batch) -> int | None:
    """The rows that all tensors agree on, whatever else is in the batch; None where they do not, or there are none."""
    counts = {len(leaf) for leaf in every_leaf(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0}
    return counts.pop() if len(counts) == 1 else None


def leaves_by_path(batch: Batch) -> list[tuple[str, Any]]:
    """Everything that is not a container, with the path that leads to it: `["labels"]`, `[0].mask`."""
    children = children_of(batch)
    if children is None:
        return [("", batch)]
    return [(name + path, leaf) for name, part in children for path, leaf in leaves_by_path(part)]


def structure(batch: Batch) -> Hashable:
    """What a batch is made of, whatever its sizes: two batches of one loader have the same."""
    kind = type(batch)
    if kind is Tensor:
        return batch.dtype, batch.dim()
    if kind is tuple or kind is list:  # exact types first: this runs for every window
        return kind, *map(structure, batch)
    children = children_of(batch)
    if children is None:
        return kind.__qualname__
    return kind.__qualname__, *[(name, structure(part)) for name, part in children]


def equal(batch: Batch, other: Batch) -> bool:
    """Whether two batches hold the same values in the same places; False where that cannot be told."""
    ours, theirs = every_leaf(batch), every_leaf(other)
    return len(ours) == len(theirs) and all(map(_is_equal, ours, theirs))


class Marks:
    """What stood in a batch, to tell later whether it was written to, or has something else in it.

    Of an object that is not a container the attributes are looked at, too. With `is_new` every tensor and container
    was made for this batch, so nothing needs to be kept.
    """

    def __init__(self, batch: Batch, is_new: bool = False) -> None:
        self._batch = batch
        self._before = None if is_new else self._look()

    def changed(self) -> str | None:
        """The path of something that is not as it was."""
        now = self._look()
        if self._before is None:
            return next((path for path, (_, version) in now.items() if version), None)
        for path, (leaf, version) in self._before.items():
            other, _ = now.get(path, (None, 0))
            is_same = leaf is None or leaf is other or _is_equal(leaf, other)  # what was None is filled in once
            if not is_same or _version_of(leaf) != version:
                return path
        return None

    def _look(self) -> dict[str, tuple[Any, int]]:
        leaves = leaves_by_path(self._batch)
        leaves += [(path + inner, part) for path, leaf in leaves for inner, part in _held_by(leaf)]
        return {path: (leaf, _version_of(leaf)) for path, leaf in leaves}


def _version_of(leaf: object) -> int:
    return 0 if not isinstance(leaf, Tensor) or leaf.is_inference() else leaf._version


def _held_by(leaf: object) -> list[tuple[str, Any]]:
    """What stands in the attributes of an object of an unknown class, and in the containers in them."""
    if isinstance(leaf, (Tensor, *CONSTANTS, type)):
        return []
    slots = [name for kind in type(leaf).__mro__ for name in getattr(kind, "__slots__", ())]
    names = dict.fromkeys([*getattr(leaf, "__dict__", ()), *getattr(leaf, "_fields", ()), *slots])
    held = [(f".{name}", getattr(leaf, name)) for name in names if hasattr(leaf, name)]
    return [(path + inner, part) for path, value in held for inner, part in leaves_by_path(value)]


def _is_equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.layout is b.layout is torch.strided and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, PackedSequence) and isinstance(b, PackedSequence):
        return torch.equal(a.data, b.data) and torch.equal(a.batch_sizes, b.batch_sizes)
    return a is b or (isinstance(a, CONSTANTS) and type(a) is type(b) and a == b)


def contents_of(batch: Batch) -> list[Hashable]:
    """What tells the tensors of a batch from what they hold after something was written to them.

    Version counters, and a few numbers of those on the host, whose memory numpy may write to.
    """
    tensors = [leaf for leaf in every_leaf(batch) if isinstance(leaf, Tensor) and not leaf.is_inference()]
    return [(one._version, _few_bytes(one)) for one in tensors]


def _few_bytes(tensor: Tensor) -> bytes:
    if not tensor.is_cpu or tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel():
        return b""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach()[..., :1].reshape(-1)
    few = flat[:: -(-len(flat) // _FEW)].resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return bytes(few.view(torch.uint8).tolist())


def every_leaf(batch: Batch) -> list[Any]:
    """The tensors of a nesting, and everything else that is not a container."""
    return [leaf for _, leaf in leaves_by_path(batch)]


def is_dataclass(node: object) -> bool:
    """Whether this is a dataclass's instance, not the class itself."""
    return dataclasses.is_dataclass(node) and not isinstance(node, type)


def children_of(node: object) -> list[tuple[str, Any]] | None:
    """The parts of a container with the path that leads to them, or None for a leaf."""
    if not _is_container(node):
        return None
    if isinstance(node, Mapping):
        return [(f"[{key!r}]", value) for key, value in node.items()]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return [(f".{name}", getattr(node, name)) for name in node._fields]
    if isinstance(node, tuple | list):
        return [(f"[{index}]", item) for index, item in enumerate(node)]
    return [(f".{name}", value) for name, value in _attributes(node).items()]
