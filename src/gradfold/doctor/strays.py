"""A stray: a parameter that gets gradients and is in no optimizer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__: list[str] = []

_ELEMENTS = 16  # kept of each, to see whether it was changed by hand


class Strays:
    """All strays met so far.

    Attributes:
        parameters: by id; kept alive, so that ids stay theirs.
        backwards: by id, the numbers of the backward passes that gave it a gradient.
    """

    def __init__(self) -> None:
        self.parameters: dict[int, Tensor] = {}
        self.backwards: dict[int, list[int]] = {}
        self._values: dict[int, Tensor] = {}

    def note(self, leaves: Iterable[Tensor], known: set[int], index: int) -> None:
        """A backward pass reaches leaves, of which those with known ids have an optimizer."""
        for leaf in leaves:
            if not isinstance(leaf, nn.Parameter) or id(leaf) in known:
                continue
            if id(leaf) not in self.parameters:
                self.parameters[id(leaf)] = leaf
                self._values[id(leaf)] = _some(leaf).clone()
            self.backwards.setdefault(id(leaf), []).append(index)

    def entries(self, parameters: Iterable[Tensor]) -> list[int]:
        """The backward passes whose gradients stand in parameters that have just got an optimizer."""
        found: set[int] = set()
        for one in parameters:
            if one.grad is not None and bool(one.grad.any()):
                found.update(self.backwards.get(id(one), ()))
        return sorted(found)

    def unmoved(self, known: set[int]) -> dict[int, Tensor]:
        """Those that have got no optimizer since, and that nothing changed by hand."""
        return {
            key: one
            for key, one in self.parameters.items()
            if key not in known and torch.equal(_some(one), self._values[key])
        }


def _some(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten()[:_ELEMENTS]
