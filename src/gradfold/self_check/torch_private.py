"""Private names of torch that the self-check and verification use. All were seen on torch 2.13.0 (CPU)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# Without it custom generators are not found: what they alone draw looks as if runs could not be repeated.
from torch.overrides import TorchFunctionMode as TorchFunctionMode

# Without it random numbers are neither recorded nor handed to rows (no check of models that draw), nor memory traced.
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# Without it: nested tuples, lists and dicts walked by hand.
from torch.utils._pytree import tree_leaves as tree_leaves


def is_compiled(modules: Iterable[nn.Module]) -> bool:
    """Whether one is of `torch.compile(module)` (`_orig_mod`) or of `module.compile()` (`_compiled_call_impl`).

    Under a mode it would be compiled again, as it is without these names.
    """
    return any(getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod") for module in modules)


def operator_name(func: Any) -> str:
    """Name of an operator, without namespace and overload. Without `_opname`: `func.name()`, split at "::" and "."."""
    name: str = func._opname
    return name


def input_dtypes(node: Any) -> set[torch.dtype]:
    """The floating point dtypes of the gradients that arrive at a node of the autograd graph.

    Without `_input_metadata` the precision met is taken to be that of the parameters.
    """
    return {one.dtype for one in node._input_metadata if one.dtype.is_floating_point}
