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


def leaf_of(node: Any) -> Tensor | None:
    """The tensor that a node accumulates into; None where it is not an AccumulateGrad."""
    leaf = getattr(node, "variable", None)
    return leaf if isinstance(leaf, Tensor) else None


def graph_leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that a backward pass from these accumulates into."""
    nodes = walk(tensor.grad_fn for tensor in tensors)
    return [leaf for leaf in map(leaf_of, nodes) if leaf is not None]
