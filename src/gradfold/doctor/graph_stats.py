"""Graph statistics: what the autograd graph of one micro-batch contains, from its loss to inputs and parameters."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from gradfold.engine.graph import walk
from gradfold.engine.loss_graph import INPUTS, compared_rows
from gradfold.torch_private import ACCUMULATE_GRAD

_MOST_NODES = 20_000
_NUMBERS = 8  # kept of each input


@dataclass
class GraphStats:
    """What a graph contains; empty where it was not walked."""

    is_walked: bool = False
    is_whole: bool = False  # whether it was walked to its end
    # The running mean (None without one) of every BatchNorm that used the micro-batch's own statistics.
    batch_norms: list[Tensor | None] = field(default_factory=list)
    activation_bytes: int = 0  # kept for the backward pass, without parameters
    # Rows of the square matrices that compare samples with each other, and of the products summed over samples.
    compared_rows: list[int] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)  # the tensors that the backward pass computes a gradient of
    parameters: frozenset[int] = frozenset()  # ids of the leaves
    # The first numbers of each tensor that needs no gradient, such as the model's inputs and targets.
    inputs: list[Tensor] = field(default_factory=list)


def graph_stats(loss: Tensor, may_read: bool) -> GraphStats:
    """Walk the graph of a loss.

    `may_read` is whether to read what operators keep. Not where hooks pack saved tensors: unpacking may run the user's
    code again (checkpointing) or copy from another device.
    """
    stats, nodes = GraphStats(is_walked=True), list(walk([loss.grad_fn], _MOST_NODES))
    storages: dict[int, int] = {}  # sizes by address
    factors: list[Tensor] = []  # of elementwise products: a model's input where it has no layers, else often a mask
    for node in nodes:
        name = node.name()
        if name == ACCUMULATE_GRAD:
            stats.leaves.append(node.variable)
            continue
        if "BatchNorm" in name and getattr(node, "_saved_training", True) and not _is_instance_norm(node):
            stats.batch_norms.append(getattr(node, "_saved_running_mean", None))
        if may_read:
            _read(node, stats, storages, factors)
    if may_read:
        stats.compared_rows = compared_rows(loss)
    stats.is_whole = len(nodes) < _MOST_NODES
    stats.parameters = frozenset(map(id, stats.leaves))
    stats.inputs = stats.inputs or factors
    leaves = {leaf.untyped_storage().data_ptr() for leaf in stats.leaves if leaf.layout == torch.strided}
    stats.activation_bytes = sum(size for pointer, size in storages.items() if pointer not in leaves)
    return stats


def _is_instance_norm(node: Any) -> bool:
    """InstanceNorm is computed as a batch normalization of one row, with copies of its weights for every sample."""
    rows = getattr(node, "_saved_input", None)
    is_single = isinstance(rows, Tensor) and rows.dim() > 1 and rows.shape[0] == 1
    has_own_weights = any(child is not None and child.name() == ACCUMULATE_GRAD for child, _ in node.next_functions[1:])
    return is_single and not has_own_weights


@cache
def _saved_names(kind: Hashable) -> tuple[str, ...]:
    """The tensors that operators of a kind keep."""
    names = [name for name in dir(kind) if name.startswith("_saved_")]
    return tuple(name for name in names if not name.endswith(("_sym_sizes", "_sym_strides", "_sym_numel")))


def _read(node: Any, stats: GraphStats, storages: dict[int, int], factors: list[Tensor]) -> None:
    for name in _saved_names(cast(Hashable, type(node))):
        saved = getattr(node, name)
        if not isinstance(saved, Tensor) or saved.layout != torch.strided:
            continue
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        if saved.requires_grad or saved.dim() == 0 or saved.numel() < 2:
            continue
        field_name, numbers = name.removeprefix("_saved_"), saved.reshape(-1)[:_NUMBERS]
        if field_name in (*INPUTS, "target"):
            stats.inputs.append(numbers.clone())
        elif field_name == "other":
            factors.append(numbers.clone())
