"""Leftovers: what a waiting forward pass has left on the modules, where those of other micro-batches would find it.

In lock-step the forward passes of all micro-batches are under way at once, on one model. What one of them has put there
and comes back for (a loss that a layer keeps, a list of features, a parameter in the place of another) the next one
overwrites.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from gradfold.errors import BatchNormError

__all__: list[str] = []

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class Leftovers:
    """The modules as they are before any forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (name, module, dict(vars(module)), dict(module._parameters)) for name, module in model.named_modules()
        ]
        self._contents = [
            (name, key, value, list(_inside(value)))
            for name, _, attributes, _ in self._modules
            for key, value in attributes.items()
            if key not in _OF_EVERY_MODULE and isinstance(value, (list, dict, deque))
        ]
        self._are_trained = [(name, one, one.requires_grad) for name, one in model.named_parameters()]

    def refuse(self, layer: Callable[[], str]) -> None:
        """Raise BatchNormError where a forward pass that waits at this layer has left something.

        Numbers are let pass, such as a count of calls: they are the user's.
        """
        found = next(self._find(), None)
        if found is None:
            return
        raise BatchNormError(
            f"while a forward pass waits at BatchNorm in {layer()}, {found} is not what it was before. In "
            'batch_norm="exact" the forward passes of all micro-batches wait there at once, so that the next one would '
            "overwrite it. Hand values on as arguments and return them (to the loss, too), set modes before the loss, "
            'and leave torch.func.functional_call out; or use batch_norm="per_micro_batch".',
            (layer(),),
        )

    def _find(self) -> Iterator[str]:
        for name, module, attributes, parameters in self._modules:
            yield from _changed(name, module, attributes)
            if any(parameters.get(key) is not value for key, value in module._parameters.items()):
                yield f"a parameter of {_named(name)}"
        for name, key, value, content in self._contents:
            inside = list(_inside(value))
            if len(inside) != len(content) or any(a is not b for a, b in zip(inside, content, strict=True)):
                yield f"what is in the attribute {key!r} of {_named(name)}"
        for name, parameter, is_trained in self._are_trained:
            if parameter.requires_grad != is_trained:
                yield f"whether {name} requires grad"


def _changed(name: str, module: nn.Module, attributes: dict[str, Any]) -> Iterator[str]:
    for key, value in vars(module).items():
        if value is attributes.get(key) or key in _OF_EVERY_MODULE:
            continue
        if key == "training":
            yield f"the mode of {_named(name)} (training or not)"
        elif isinstance(value, Tensor) or any(isinstance(one, Tensor) for one in _inside(value)):
            yield f"the attribute {key!r} of {_named(name)}"


def _inside(value: Any) -> Iterator[Any]:
    """What is in a container; nothing in anything else."""
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, deque)):
        yield from value


def _named(name: str) -> str:
    return name or "the model itself"
