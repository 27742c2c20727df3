"""The autograd graph: a walk from some tensors to the leaves that a backward pass accumulates into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Every node (`tensor.grad_fn` and what it leads to) behind these tensors, once."""
    seen: set[Any] = set()
    ahead: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            yield node
            ahead += [following for following, _ in node.next_functions if following is not None]


def leaf_of(node: Any) -> Tensor | None:
    """The tensor that a node accumulates into; None where it is not an AccumulateGrad."""
    leaf = getattr(node, "variable", None)
    return leaf if isinstance(leaf, Tensor) else None


def graph_leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors that a backward pass from these accumulates into."""
    return [leaf for leaf in map(leaf_of, graph_nodes(tensors)) if leaf is not None]
