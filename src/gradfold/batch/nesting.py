"""A batch: any nesting of tuples, lists, dicts, dataclasses and named tuples around tensors that agree in dim 0.

Dim 0 counts the *rows* (samples). Here the nesting is walked and rebuilt, whatever has rows in it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Hashable, Mapping
from enum import Enum
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from gradfold.batch.own_rows import keeper_of_kind
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
    if not is_container(batch):
        return batch
    try:
        own = rebuilt(in_own_containers, batch)
    except Exception:  # the user's class
        return batch
    return own if type(own) is type(batch) else batch


def map_leaves(fn: Callable[[Any], Any], batch: Batch) -> Batch:
    """Rebuild a nesting with `fn(leaf)` in the place of each tensor and of everything else that is not a container."""
    return rebuilt(partial(map_leaves, fn), batch) if is_container(batch) else fn(batch)


def is_container(node: object) -> bool:
    """Whether a nesting goes on inside; not of a dataclass that can be sliced, which knows more than its fields."""
    if isinstance(node, (Tensor, PackedSequence)):  # the latter is a named tuple whose parts are not per row
        return False
    if isinstance(node, (tuple, list, Mapping)):
        return True
    return is_dataclass(node) and keeper_of_kind(type(node)) is None


def rebuilt(fn: Callable[[Any], Any], batch: Batch) -> Batch:
    """A container with `fn(part)` in the place of each part."""
    if isinstance(batch, (tuple, list)):
        items = [fn(item) for item in batch]
        return batch._make(items) if hasattr(batch, "_make") else type(batch)(items)
    if isinstance(batch, Mapping):
        return refilled(batch, {key: fn(value) for key, value in batch.items()})
    # A copy, not a call of the class: __post_init__ has run once and may not accept its own results.
    filled = copy.copy(batch)
    for name in _computed(batch):  # again, of the new values
        del filled.__dict__[name]
    for name, value in _attributes(batch).items():
        object.__setattr__(filled, name, fn(value))
    return filled


def refilled(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """The values in a mapping of the batch's own type, where it can be made; else as a dict.

    Raises BatchError where its constructor would lose what it knows besides its keys.
    """
    kind = type(batch)
    if kind is dict:
        return values
    if (copied := _own_copy(batch)) is not None:
        for key, value in values.items():
            copied[key] = value
        return cast("Mapping[Any, Any]", copied)
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
            is_same = all(made[key] is value for key, value in values.items())
        except (TypeError, KeyError, ValueError, AttributeError):
            continue
        if is_same:
            _check_kept(batch, made)
            return made
    return values


def _own_copy(batch: Any) -> Any:
    """A copy that a sliceable mapping makes of itself, whose keys can be set: that of a TensorDict keeps its shape."""
    if keeper_of_kind(type(batch)) is None or isinstance(batch, UserDict):
        return None
    make = getattr(batch, "copy", None)
    copied = make() if callable(make) else None
    return copied if copied is not batch and type(copied) is type(batch) else None


def _check_kept(batch: object, made: object) -> None:
    """Raise BatchError where a mapping that was made again has another number, name or shape than the first."""
    if batch is vars(batch) if hasattr(batch, "__dict__") else True:
        return
    for name, value in vars(batch).items():
        if isinstance(value, (*CONSTANTS, torch.Size)) and value != getattr(made, name, value):
            raise BatchError(
                f"a {type(batch).__name__} cannot be made again of other values without losing its {name} "
                f"({value!r}). Give the class slices of its own kind (__getitem__, __len__ and to), or pass a dict."
            )


def _attributes(batch: Any) -> dict[str, Any]:
    """What stands in a dataclass: its fields, and what else was put into it (a mask that __post_init__ made)."""
    names = [field.name for field in dataclasses.fields(batch)]
    values = {name: getattr(batch, name) for name in names if hasattr(batch, name)}
    beside = {name: value for name, value in getattr(batch, "__dict__", {}).items() if name not in _computed(batch)}
    return values | beside


def _computed(batch: object) -> list[str]:
    """The names of cached properties that have a value, which is computed again where it is missing."""
    kind = type(batch)
    return [name for name in getattr(batch, "__dict__", ()) if isinstance(getattr(kind, name, None), cached_property)]


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
        if a.is_nested and b.is_nested:
            return a.size(0) == b.size(0) and all(map(_is_equal, a.unbind(), b.unbind()))
        return a.layout is b.layout is torch.strided and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, PackedSequence) and isinstance(b, PackedSequence):
        return torch.equal(a.data, b.data) and torch.equal(a.batch_sizes, b.batch_sizes)
    if a is b or type(a) is not type(b):
        return a is b
    return a == b if isinstance(a, CONSTANTS) else _holds_equal(a, b)


def _holds_equal(a: object, b: object) -> bool:
    """Whether two objects of a class hold the same, as far as they say what they hold."""
    if hasattr(a, "to_dict") and hasattr(b, "to_dict"):  # a batch of graphs
        return equal(a.to_dict(), b.to_dict())
    ours, theirs = dict(_held_by(a)), dict(_held_by(b))
    if not ours or ours.keys() != theirs.keys():
        return False
    are_known = all(isinstance(one, (Tensor, *CONSTANTS)) or one is theirs[path] for path, one in ours.items())
    return are_known and all(_is_equal(ours[path], theirs[path]) for path in ours)


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
    if not is_container(node):
        return None
    if isinstance(node, Mapping):
        return [(f"[{key!r}]", value) for key, value in node.items()]
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return [(f".{name}", getattr(node, name)) for name in node._fields]
    if isinstance(node, tuple | list):
        return [(f"[{index}]", item) for index, item in enumerate(node)]
    return [(f".{name}", value) for name, value in _attributes(node).items()]
