"""A graph: what autograd recorded between the parameters and a loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


@dataclass(frozen=True)
class Graph:
    """What a backward pass from some loss terms runs through.

    Attributes:
        leaves: the tensors that it accumulates into.
        dtypes: of the floating point numbers on the way; a custom `autograd.Function` may use others inside.
    """

    leaves: list[Tensor]
    dtypes: set[torch.dtype]

    @classmethod
    def of(cls, terms: Iterable[Tensor]) -> Graph:
        """The graph behind these terms."""
        leaves: list[Tensor] = []
        dtypes: set[torch.dtype] = set()
        seen: set[Any] = set()
        ahead: list[Any] = [term.grad_fn for term in terms if term.grad_fn is not None]
        while ahead:
            node = ahead.pop()
            if node in seen:
                continue
            seen.add(node)
            dtypes |= {one.dtype for one in node._input_metadata if one.dtype.is_floating_point}
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, Tensor):
                leaves.append(leaf)
            ahead += [following for following, _ in node.next_functions if following is not None]
        return cls(leaves, dtypes)
