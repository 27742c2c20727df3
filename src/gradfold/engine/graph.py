"""The autograd graph: a walk from some nodes to the leaves that a backward pass accumulates into."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor


def walk(
    roots: Iterable[Any], most: float = math.inf, stops_at: Callable[[Any], bool] = lambda node: False
) -> Iterator[Any]:
    """The nodes behind some (`tensor.grad_fn`, or None), depth first, each once and at most so many.

    None below those where `stops_at` is true.
    """
    seen: set[Any] = set()
    stack = list(roots)
    while stack and len(seen) < most:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not stops_at(node):
            stack += [child for child, _ in node.next_functions]


def leaves_of(nodes: Iterable[Any]) -> list[Tensor]:
    """The tensors that these nodes accumulate into, each as an AccumulateGrad."""
    found = (getattr(node, "variable", None) for node in nodes)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


def graph_leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that a backward pass from these accumulates into."""
    return leaves_of(walk(tensor.grad_fn for tensor in tensors))
