"""The attributes of modules and of their parameters: saved, and put back.

A counter, a loss that a layer stores, a list that is appended to, a tensor that is changed in place; the gradients per
sample that a hook keeps on a parameter. Parameters and buffers themselves have keepers of their own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradfold.torch_private import set_versions

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # parameters, buffers, children and hooks have their own keepers

# Their subclasses may forbid to be emptied, or keep more than their items (a frozen config, a model's output).
CONTAINERS = (list, deque, set, dict, defaultdict, OrderedDict, Counter)


class ModuleAttributes:
    """The attributes of some modules and their parameters, saved. Objects inside of attributes are not followed."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        modules = list(modules)
        parameters = chain.from_iterable(module.parameters(recurse=False) for module in modules)
        self._kept = [
            (owner, {name: (value, keep_contents(value)) for name, value in _attributes_of(owner).items()})
            for owner in chain[Any](modules, parameters)
        ]

    def restore(self) -> None:
        """Bind every attribute to what it was bound to, with the contents that it had."""
        for owner, attributes in self._kept:
            now = vars(owner)
            for name in _attributes_of(owner).keys() - attributes.keys():
                del now[name]
            now.update({name: value for name, (value, _) in attributes.items()})
        for _, contents in chain.from_iterable(attributes.values() for _, attributes in self._kept):
            if contents is not None:
                contents.restore()

    def changed(self, model: nn.Module) -> list[str]:
        """The names of the attributes of modules that differ from what they were."""
        paths = {id(module): path for path, module in model.named_modules()}
        found = []
        for owner, before in self._kept:
            path, now = paths.get(id(owner)), _attributes_of(owner)
            if path is None:
                continue
            names = [name for name in now if name not in before or now[name] is not before[name][0]]
            names += [name for name, (_, one) in before.items() if name not in now or (one and one.have_changed())]
            found += [f"{path}.{name}" if path else name for name in dict.fromkeys(names)]
        return found


class Contents(NamedTuple):
    """A container or a tensor, and a copy of what was in it."""

    value: Any
    copy: Any
    version: int  # of a tensor

    def have_changed(self) -> bool:
        """Whether something else is in it now."""
        if isinstance(self.value, Tensor):
            return bool(self.value._version != self.version)
        return _items(self.value) != _items(self.copy)

    def restore(self) -> None:
        """Put back what was in it, if that has changed."""
        if not self.have_changed():
            return
        if isinstance(self.value, Tensor):
            with torch.no_grad():
                if self.value.shape != self.copy.shape:
                    self.value.resize_(self.copy.shape)
                self.value.copy_(self.copy)
            set_versions((self.value,), (self.version,))  # the same as then, for whoever asks what has changed since
        else:
            self.value.clear()
            (self.value.extend if isinstance(self.value, (list, deque)) else self.value.update)(self.copy)


def keep_contents(value: Any) -> Contents | None:
    """A copy of the contents of a container or a tensor; None of other values, which are not copied."""
    if type(value) in CONTAINERS:
        return Contents(value, value.copy(), 0)
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    if value.is_inference() or is_expanded(value):  # inference tensors have no version; nothing writes to either
        return None
    return Contents(value, value.detach().clone(), value._version)


def is_expanded(tensor: Tensor) -> bool:
    """Whether one element stands for many, so that nothing can be written, by us or by a forward pass."""
    return tensor.layout is torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _attributes_of(owner: nn.Module | nn.Parameter) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if name not in OF_EVERY_MODULE}


def _items(container: Any) -> list[int]:
    """By identity: tensors have no truth value, and what compares equal may be another object."""
    return [id(one) for one in ([*container, *container.values()] if isinstance(container, Mapping) else container)]
