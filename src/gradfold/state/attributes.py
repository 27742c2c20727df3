"""The attributes of modules that are neither parameters nor buffers: saved, and put back.

A counter, a loss that a layer stores, a list that is appended to, a tensor that is changed in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
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

    @torch.no_grad()
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


def _put_back(value: Any, copy: Any) -> None:
    if isinstance(value, Tensor):
        version, content = copy
        if value._version != version:
            value.copy_(content)
    elif isinstance(value, (dict, set)):
        if value != copy or isinstance(value, dict):
            value.clear()
            value.update(copy)
    else:
        value.clear()
        value.extend(copy)
