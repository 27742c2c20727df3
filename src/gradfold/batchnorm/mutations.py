"""Module-state mutations: what a paused forward pass has left on the modules, where the next one would overwrite it.

That is a loss that a layer keeps, a list of features, one parameter in place of another, and the like.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from enum import Enum
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from gradfold.batchnorm.torch_private import BatchNorm
from gradfold.errors import BatchNormError
from gradfold.state.attributes import CONTAINERS, OF_EVERY_MODULE

_PLAIN = (int, float, complex, str, bytes, type(None), Enum, type, range, slice, torch.dtype, torch.device)
_ATTRIBUTE = "the attribute {key!r} of {module}"


class ModuleMutations:
    """The modules as they are before any forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(name, one, _identity(one), _bindings(one)) for name, one in model.named_modules()]
        self._contents = [
            (name, key, value, list(_inside(value)))
            for name, _, _, bindings in self._modules
            for (kind, key), value in bindings.items()
            if kind == _ATTRIBUTE and (isinstance(value, CONTAINERS) or not _is_plain(value))
        ]
        # Numbers and text that the first forward pass has left: where in words, the place, the value before and after.
        self._plain: list[tuple[str, nn.Module, str, Any, Any]] = []

    def refuse(self, number: int, layer: str) -> None:
        """Raise BatchNormError for what forward pass `number` has left, which waits at this layer.

        The first must not leave objects, nor others a number or text that differs from the first's. A count of calls,
        which grows by the same in each micro-batch, is allowed.
        """
        if number == 0:
            self._plain = []
            found = next(self._find(), None)
            if found is not None:
                raise _mutation_error(layer, f"{found} is not what it was before")
        for where, module, key, before, first in self._plain if number else ():
            value = vars(module).get(key)
            if value != first and not _is_count(before, first, value, number):
                raise _mutation_error(layer, f"{where} is {first!r} in one micro-batch and {value!r} in another")

    def _find(self) -> Iterator[str]:
        for name, module, identity, before in self._modules:
            if all(map(is_, identity, _identity(module))):
                continue
            for (kind, key), value in _bindings(module).items():
                known = before.get((kind, key), None if kind == _ATTRIBUTE else value)
                if known is value:
                    continue
                where = kind.format(key=key, module=name or "the model itself", path=f"{name}.{key}".lstrip("."))
                if kind == _ATTRIBUTE and _is_plain(value):
                    self._plain.append((where, module, key, known, value))
                else:
                    yield where
        for name, key, value, content in self._contents:
            inside = list(_inside(value))
            if len(inside) != len(content) or not all(map(is_, inside, content)):
                yield f"what is in the attribute {key!r} of {name or 'the model itself'}"


def _identity(module: nn.Module) -> tuple[Any, ...]:
    """All that a module holds: a fast first look."""
    parameters = module._parameters.values()
    grads = (one is not None and one.requires_grad for one in parameters)
    return *vars(module).values(), None, *parameters, None, *grads, *module._buffers.values()


def _bindings(module: nn.Module) -> dict[tuple[str, str], Any]:
    """What the names of a module are bound to, by how a message calls them.

    Without counters, which are restored, and without buffers of lazy layers, which the first forward pass makes.
    """
    found = {(_ATTRIBUTE, key): value for key, value in vars(module).items() if key not in OF_EVERY_MODULE}
    found["the mode of {module} (training or not)", ""] = module.training
    for key, parameter in module._parameters.items():
        found["a parameter of {module}", key] = parameter
        if parameter is not None:
            found["whether {path} requires grad", key] = parameter.requires_grad
    if module._buffers and not isinstance(module, LazyModuleMixin):
        for key, buffer in module._buffers.items():
            if key != "num_batches_tracked" or not isinstance(module, BatchNorm):
                found["the buffer {key!r} of {module}", key] = buffer
    return found


def _is_count(before: Any, first: Any, value: Any, number: int) -> bool:
    """Whether it is an int that grows by the same in each of the `number` micro-batches after the first."""
    before = 0 if before is None else before
    are_ints = {type(before), type(first), type(value)} == {int}
    return are_ints and bool(value - first == number * (first - before))


def _mutation_error(layer: str, found: str) -> BatchNormError:
    return BatchNormError(
        f'while a forward pass waits at BatchNorm in {layer}, {found}. With batch_norm="exact" the forward passes of '
        "all micro-batches wait there at once, so the next one would overwrite it. Pass values as arguments and return "
        "them (to the loss, too), set modes before the loss, and leave torch.func.functional_call out; or use "
        'batch_norm="per_micro_batch".',
        (layer,),
    )


def _is_plain(value: Any) -> bool:
    """Whether it is a number, text or the like, or holds nothing else."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list, set, frozenset, deque)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _inside(value: Any, depth: int = 3) -> Iterator[Any]:
    """What a container or an object holds, at any depth that is likely."""
    inside: Iterable[Any] = ()
    if isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, (list, tuple, deque)):
        inside = value
    elif not isinstance(value, (Tensor, nn.Module, type)) and not callable(value):
        inside = getattr(value, "__dict__", {}).values()
    for one in inside:
        if not _is_plain(one):
            yield one
            if depth > 1:
                yield from _inside(one, depth - 1)
