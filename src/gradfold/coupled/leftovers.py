"""Leftovers: what a waiting forward pass has left on the modules, where those of other micro-batches would find it.

In lock-step the forward passes of all micro-batches are under way at once, on one model. What one of them has put there
and comes back for (a loss that a layer keeps, a list of features, a parameter in the place of another) the next one
overwrites.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from gradfold.errors import BatchNormError

__all__: list[str] = []

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
_FILLED = (list, dict, deque, set)
_PLAIN = (int, float, complex, str, bytes, type(None), Enum, type, range, slice, torch.dtype, torch.device)


class Leftovers:
    """The modules as they are before any forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (name, module, dict(vars(module)), dict(module._parameters), _buffers_of(module))
            for name, module in model.named_modules()
        ]
        self._contents = [
            (name, key, value, list(_inside(value)))
            for name, _, attributes, _, _ in self._modules
            for key, value in attributes.items()
            if key not in _OF_EVERY_MODULE and (isinstance(value, _FILLED) or not _is_plain(value))
        ]
        self._are_trained = [(name, one, one.requires_grad) for name, one in model.named_parameters()]
        self._values: list[_Value] = []

    def refuse(self, number: int, layer: str) -> None:
        """Look at what the forward pass of this number has left, which waits at this layer.

        Raises:
            BatchNormError: the first has left something; or another one, and these are numbers or text, others than
                the first. A count of calls is let pass, which is one more each time: it is the user's.
        """
        if number:
            self._refuse_other_values(number, layer)
            return
        self._values = []
        found = next(self._find(), None)
        if found is not None:
            raise _refused(layer, f"{found} is not what it was before")

    def _refuse_other_values(self, number: int, layer: str) -> None:
        for one in self._values:
            value = vars(one.module).get(one.key)
            if value != one.value and not one.is_count(value, number):
                where = f"the attribute {one.key!r} of {_named(one.name)}"
                raise _refused(layer, f"{where} is {one.value!r} in one micro-batch and {value!r} in another")

    def _find(self) -> Iterator[str]:
        for name, module, attributes, parameters, buffers in self._modules:
            yield from self._changed(name, module, attributes)
            if any(parameters.get(key) is not value for key, value in module._parameters.items()):
                yield f"a parameter of {_named(name)}"
            for key, value in buffers.items():
                if module._buffers.get(key) is not value:
                    yield f"the buffer {key!r} of {_named(name)}"
        for name, key, value, content in self._contents:
            inside = list(_inside(value))
            if len(inside) != len(content) or any(a is not b for a, b in zip(inside, content, strict=True)):
                yield f"what is in the attribute {key!r} of {_named(name)}"
        for name, parameter, is_trained in self._are_trained:
            if parameter.requires_grad != is_trained:
                yield f"whether {name} requires grad"

    def _changed(self, name: str, module: nn.Module, attributes: dict[str, Any]) -> Iterator[str]:
        for key, value in vars(module).items():
            if value is attributes.get(key) or key in _OF_EVERY_MODULE:
                continue
            if key == "training":
                yield f"the mode of {_named(name)} (training or not)"
            elif _is_plain(value):
                self._values.append(_Value(name, module, key, attributes.get(key), value))
            else:
                yield f"the attribute {key!r} of {_named(name)}"


@dataclass(frozen=True, slots=True)
class _Value:
    """A number or text, or some of them, that the first forward pass has left."""

    name: str
    module: nn.Module
    key: str
    before: Any
    value: Any

    def is_count(self, now: Any, number: int) -> bool:
        """Whether it goes on by as much in each micro-batch, of which this one is so many after the first."""
        before = 0 if self.before is None else self.before
        if not {type(before), type(self.value), type(now)} <= {int}:
            return False
        return bool(now - self.value == number * (self.value - before))


def _refused(layer: str, found: str) -> BatchNormError:
    return BatchNormError(
        f'while a forward pass waits at BatchNorm in {layer}, {found}. In batch_norm="exact" the forward passes of all '
        "micro-batches wait there at once, so that the next one would overwrite it. Hand values on as arguments and "
        "return them (to the loss, too), set modes before the loss, and leave torch.func.functional_call out; or use "
        'batch_norm="per_micro_batch".',
        (layer,),
    )


def _buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """But for counters, which go by themselves, and those of lazy layers, which the first forward pass makes."""
    if not module._buffers or isinstance(module, LazyModuleMixin):
        return {}
    if isinstance(module, _BatchNorm):
        return {key: value for key, value in module._buffers.items() if key != "num_batches_tracked"}
    return dict(module._buffers)


def _is_plain(value: Any) -> bool:
    """Numbers, text and the like, and whatever holds nothing else."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list, set, frozenset, deque)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _inside(value: Any, depth: int = 3) -> Iterator[Any]:
    """What is in a container or an object, at any depth that is likely; nothing in anything else."""
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


def _named(name: str) -> str:
    return name or "the model itself"
