"""A replica: a copy of a model and its optimizer that nobody else sees, on real tensors or on fake ones.

Models are copied with their tensors replaced, since building or copying them under `FakeTensorMode` fails for some (a
0-d buffer, as BatchNorm has).
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from gradfold.errors import RanksError
from gradfold.memory.tracker import state_tensors
from gradfold.sharding import Sharding
from gradfold.sync import sharded_modules

__all__: list[str] = []

Replica: TypeAlias = "tuple[nn.Module, torch.optim.Optimizer | None]"


def real_replica(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Replica:
    """With tensors of its own.

    Raises:
        RanksError: the model has shards, which no rank can run alone.
    """
    if sharded_modules(list(model.modules())):
        raise RanksError("its parameters are sharded, so that no rank can run it alone")
    return copy.deepcopy((model, optimizer))


def fake_replica(model: nn.Module, optimizer: torch.optim.Optimizer | None, mode: FakeTensorMode) -> Replica:
    """On fake tensors; with shards where the model has them, though nothing will be sent to other ranks.

    Raises:
        RanksError: it is sharded in a way that cannot be repeated.
        Exception: whatever copying a model or an optimizer raises.
    """
    if not sharded_modules(list(model.modules())):
        memo: dict[int, Any] = {id(tensor): _fake(tensor, mode) for tensor in _tensors(model, optimizer)}
        return copy.deepcopy(model, memo), copy.deepcopy(optimizer, memo)
    sharding = Sharding(model)
    with mode:
        memo = dict(sharding.whole_parameters())
    memo |= {id(tensor): _fake(tensor, mode) for tensor in _tensors(model, optimizer) if id(tensor) not in memo}
    copied = sharding.copy(memo)
    with mode:
        memo |= sharding.apply(copied)  # which an optimizer steps
    return copied, copy.deepcopy(optimizer, memo)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Every tensor that a copy of model and optimizer would copy."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        found += [leaf for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor)]
    if optimizer is not None:
        found += [one for group in optimizer.param_groups for one in group["params"]]
        found += state_tensors(optimizer)
    return found


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake of a tensor; of a number on the host one that keeps its value, since optimizers read their counts."""
    if tensor.dim() or not tensor.is_cpu or isinstance(tensor, nn.Parameter):
        return mode.from_tensor(tensor)
    value = tensor.item()
    with mode:
        return torch.tensor(value, dtype=tensor.dtype)
