"""The attributes of modules that are neither parameters nor buffers: saved, and put back.

A counter, a loss that a layer stores, a list that is appended to, a tensor that is changed in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # parameters, buffers, children and hooks have their own keepers
_CONTAINERS = (list, dict, set, deque)


class ModuleAttributes:
    """The attributes of some modules, saved. Objects inside of attributes are not followed."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [(module, dict(vars(module))) for module in modules]
        self._inside = [
            (value, _copy(value))
            for _, attributes in self._kept
            for name, value in attributes.items()
            if name not in _OF_EVERY_MODULE and _may_change_inside(value)
        ]

    def restore(self) -> None:
        """Bind every attribute to what it was bound to, with the contents that it had."""
        for module, attributes in self._kept:
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update(attributes)
        for value, copy in self._inside:
            _put_back(value, copy)


def _may_change_inside(value: Any) -> bool:
    if isinstance(value, Tensor):
        # Inference tensors have no version, and training cannot write to them.
        return value.layout is torch.strided and not value.is_inference()
    return isinstance(value, _CONTAINERS)


def _copy(value: Any) -> Any:
    return (value._version, value.detach().clone()) if isinstance(value, Tensor) else value.copy()


def put_back_container(container: Any, saved: Any) -> None:
    """Give a list, deque, set or dict the contents of its copy, unless it holds the same objects.

    By identity: tensors have no truth value, and what compares equal may be another object.
    """
    now, before = ([*one, *one.values()] if isinstance(one, Mapping) else [*one] for one in (container, saved))
    if list(map(id, now)) != list(map(id, before)):
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(saved)


def put_back_tensor(tensor: Tensor, version: int, content: Tensor) -> None:
    """Give a tensor its contents of some version, unless it still has them."""
    if tensor._version != version:
        with torch.no_grad():
            tensor.copy_(content)


def _put_back(value: Any, copy: Any) -> None:
    if isinstance(value, Tensor):
        put_back_tensor(value, *copy)
    else:
        put_back_container(value, copy)
