"""A census: what stands in the autograd graph of one micro-batch, from its loss down to inputs and parameters."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

__all__: list[str] = []

_MOST_NODES = 20_000
_MOST_NODES_OF_LOSS = 2_000
_NUMBERS = 8  # kept of each input
_LEAF = "torch::autograd::AccumulateGrad"
_ALIKE = frozenset(
    f"{name}Backward0"
    for name in ("T", "Transpose", "Permute", "View", "ToCopy", "Clone", "Expand", "Unsqueeze", "ReshapeAlias")
) | {"CopyBackwards", "UnsafeViewBackward0", "SqueezeBackward1"}
# Where an operator keeps what it was given, if that needs no gradient: the model's input.
_INPUTS = ("mat1", "self", "input", "indices", "x1", "x2")


@dataclass
class GraphStats:
    """What was found.

    Attributes:
        num_nodes: operators in the graph.
        batch_norms: the running mean (None without) of every BatchNorm that normalized with the micro-batch's own
            statistics.
        activation_bytes: what the graph keeps for the backward pass, parameters apart.
        similarities: rows of the square matrices in which samples are compared with each other, and of the matrices of
            which products are summed over the rows.
        leaves: the tensors that a backward pass gives a gradient to.
        parameters: their ids.
        inputs: the first numbers of what needs no gradient, such as the model's inputs and targets.
        is_whole: whether the graph was walked to its end.
    """

    num_nodes: int = 0
    batch_norms: list[Tensor | None] = field(default_factory=list)
    activation_bytes: int = 0
    similarities: list[int] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    parameters: frozenset[int] = frozenset()
    inputs: list[Tensor] = field(default_factory=list)
    is_whole: bool = True


def take(loss: Tensor, may_read: bool) -> GraphStats:
    """Walk the graph of a loss.

    Args:
        loss: a tensor with a graph.
        may_read: whether to read what operators keep; not where saved tensors are packed by hooks, whose unpacking
            may run the user's code again (checkpointing) or copy from elsewhere.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> census = take(layer(torch.ones(3, 4)).mean(), may_read=True)
        >>> len(census.leaves), census.batch_norms, census.activation_bytes  # the input: 3 x 4 floats
        (2, [], 48)
    """
    census = GraphStats()
    storages: dict[int, int] = {}
    factors: list[Tensor] = []  # of products by element: a model's input where it has no layers, else often a mask
    seen, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if len(seen) > _MOST_NODES:
            census.is_whole = False
            break
        name = node.name()
        if name == _LEAF:
            census.leaves.append(node.variable)  # type: ignore[attr-defined]
        else:
            if "BatchNorm" in name and getattr(node, "_saved_training", True) and not _is_instance_norm(node):
                census.batch_norms.append(getattr(node, "_saved_running_mean", None))
            if may_read:
                _read(node, census, storages, factors)
        queue += [child for child, _ in node.next_functions]
    if may_read:
        census.similarities = _similarities_in_loss(loss.grad_fn)
    census.parameters = frozenset(map(id, census.leaves))
    census.num_nodes = len(seen)
    census.inputs = census.inputs or factors
    leaves = {leaf.untyped_storage().data_ptr() for leaf in census.leaves if leaf.layout == torch.strided}
    census.activation_bytes = sum(size for pointer, size in storages.items() if pointer not in leaves)
    return census


def _is_instance_norm(node: Any) -> bool:
    """InstanceNorm is computed as a batch normalization of one row, with copies of its weights for every sample."""
    rows = getattr(node, "_saved_input", None)
    is_single = isinstance(rows, Tensor) and rows.dim() > 1 and rows.shape[0] == 1
    return is_single and not any(child is not None and child.name() == _LEAF for child, _ in node.next_functions[1:])


def _similarities_in_loss(root: Any) -> list[int]:
    """Of the part of a graph between the loss and the last layers of the model: attention inside of it is not meant."""
    found: list[int] = []
    seen: set[Any] = set()
    queue = [root]
    while queue and len(seen) < _MOST_NODES_OF_LOSS:
        node = queue.pop()
        if node is None or node in seen or node.name() == _LEAF:
            continue
        seen.add(node)
        rows = [rows for rows in _similarities(node, node.name()) if rows > 1]
        found += rows
        if not rows and not any(_is_parameter(child) for child, _ in node.next_functions):
            queue += [child for child, _ in node.next_functions]
    return found


def _similarities(node: Any, name: str) -> tuple[int, ...]:
    """Rows of a square matrix of products or distances between samples, or rows that a product is summed over."""
    if name not in ("MmBackward0", "BmmBackward0", "CdistBackward0", "EuclideanDistBackward0", "AddmmBackward0"):
        return ()
    if not all(_depends_on_data(child) for child, _ in node.next_functions[:2]):
        return ()
    first, second = _sizes(node, ("self", "x1", "mat1")), _sizes(node, ("mat2", "x2"))
    if not first or not second:
        return ()
    if name == "BmmBackward0":  # an einsum over two matrices is one product of a stack of one
        if first[0] != 1 or second[0] != 1:
            return ()
        first, second = first[1:], second[1:]
    if len(first) < 2 or len(second) < 2:
        return ()
    if name.startswith(("Cdist", "Euclidean")):
        return (first[-2],) if first[-2] == second[-2] else ()
    pairs = (first[-2],) if first[-2] == second[-1] else ()
    return (*pairs, *_summed_rows(node, first, second))


def _summed_rows(node: Any, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    """The rows over which `z.T @ z` sums: the first factor is a transposed matrix."""
    transposing = ("TBackward0", "TransposeBackward0", "PermuteBackward0")
    child = node.next_functions[0][0]
    is_transposed = child is not None and child.name() in transposing
    return (first[-1],) if is_transposed and first[-1] == second[-2] else ()


def _sizes(node: Any, names: tuple[str, ...]) -> tuple[int, ...]:
    for name in names:
        sizes = getattr(node, f"_saved_{name}_sym_sizes", None)
        if sizes is not None:
            return tuple(sizes)
        saved = getattr(node, f"_saved_{name}", None)
        if isinstance(saved, Tensor):
            return tuple(saved.shape)
    return ()


def _depends_on_data(node: Any) -> bool:
    """Whether something that needs no gradient went into a product or a look-up below: not weights alone."""
    seen: set[Any] = set()
    queue = [node]
    while queue and len(seen) < _MOST_NODES_OF_LOSS:
        one = queue.pop()
        if one is None or one in seen:
            continue
        seen.add(one)
        for name in _INPUTS:
            saved = getattr(one, f"_saved_{name}", None)
            if isinstance(saved, Tensor) and not saved.requires_grad and saved.numel() > 1:
                return True
        queue += [child for child, _ in one.next_functions]
    return False


def _is_parameter(node: Any) -> bool:
    """Whether this is a parameter of more than one number, as it is or in another shape."""
    for _ in range(8):
        if node is None:
            return False
        if node.name() == _LEAF:
            return bool(node.variable.numel() > 1)
        if node.name() not in _ALIKE:
            return False
        node = node.next_functions[0][0]
    return False


@cache
def _saved_names(kind: Hashable) -> tuple[str, ...]:
    """What operators of a kind keep."""
    names = [name for name in dir(kind) if name.startswith("_saved_")]
    return tuple(name for name in names if not name.endswith(("_sym_sizes", "_sym_strides", "_sym_numel")))


def _read(node: Any, census: GraphStats, storages: dict[int, int], factors: list[Tensor]) -> None:
    for name in _saved_names(cast(Hashable, type(node))):
        saved = getattr(node, name)
        if not isinstance(saved, Tensor) or saved.layout != torch.strided:
            continue
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if saved.requires_grad or saved.dim() == 0 or saved.numel() < 2:
            continue
        if name[7:] in (*_INPUTS, "target"):
            census.inputs.append(_first_numbers(saved))
        elif name[7:] == "other":
            factors.append(_first_numbers(saved))


def _first_numbers(saved: Tensor) -> Tensor:
    flat = saved.reshape(-1)
    return flat.narrow(0, 0, min(_NUMBERS, flat.numel())).clone()
