"""The attributes of modules that are neither parameters nor buffers: saved, and put back.

A counter, a loss that a layer stores, a list that is appended to, a tensor that is changed in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # parameters, buffers, children and hooks have their own keepers


class ModuleAttributes:
    """The attributes of some modules, saved. Objects inside of attributes are not followed."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [(module, dict(vars(module))) for module in modules]
        self._undo = [
            undo
            for _, attributes in self._kept
            for name, value in attributes.items()
            if name not in OF_EVERY_MODULE and (undo := keep_contents(value)) is not None
        ]

    def restore(self) -> None:
        """Bind every attribute to what it was bound to, with the contents that it had."""
        for module, attributes in self._kept:
            now = vars(module)
            for name in now.keys() - attributes.keys():
                del now[name]
            now.update(attributes)
        for undo in self._undo:
            undo()


def keep_contents(value: Any) -> Callable[[], None] | None:
    """What gives a container or a tensor its present contents again; None for other values, which are not copied."""
    if isinstance(value, (list, dict, set, deque)):
        return partial(_put_back_container, value, value.copy())
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    if value.is_inference() or is_expanded(value):  # inference tensors have no version; nothing writes to either
        return None
    return partial(_put_back_tensor, value, value._version, value.detach().clone())


def _put_back_container(container: Any, saved: Any) -> None:
    """By identity: tensors have no truth value, and what compares equal may be another object."""
    now, before = ([*one, *one.values()] if isinstance(one, Mapping) else [*one] for one in (container, saved))
    if list(map(id, now)) != list(map(id, before)):
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(saved)


def _put_back_tensor(tensor: Tensor, version: int, content: Tensor) -> None:
    if tensor._version != version:
        with torch.no_grad():
            tensor.copy_(content)


def is_expanded(tensor: Tensor) -> bool:
    """Whether one element stands for many, so that nothing can be written, by us or by a forward pass."""
    return tensor.layout is torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
