"""DistributedDataParallel: its modules are found anywhere in a model, and their own reductions are switched off.

gradfold reduces gradients once per window, so forward *and* backward passes of these modules run under `no_sync`.
Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html (`no_sync`: "the
forward pass should be included inside the context manager").
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, TypeAlias

import torch
import torch.distributed
from torch import nn

from gradfold.distributed.fsdp import refuse_unsharded, sharded_modules
from gradfold.distributed.process_group import ProcessGroup
from gradfold.distributed.torch_private import group_of, sync_buffers
from gradfold.errors import DistributedError, OptionError

DistributedOption: TypeAlias = Literal[False] | None


def check_distributed(distributed: object) -> None:
    """Raise OptionError unless the option is known."""
    if distributed is not None and distributed is not False:
        raise OptionError(
            f"distributed={distributed!r}; expected None (the processes of the DistributedDataParallel or fully_shard "
            "modules in the model) or False (this process trains by itself)."
        )


def find_process_group(
    modules: Sequence[nn.Module], device: torch.device, option: DistributedOption
) -> ProcessGroup | None:
    """The processes that train these modules together; None if there is one.

    Raises:
        DistributedError: there are several, and it is unclear or unsupported how they do it.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized() or option is False:
        return None
    for module in modules:
        _refuse_foreign(module)
    wrapped = parallel_modules(modules)
    sharded = sharded_modules(modules)
    if sharded:
        if wrapped:
            raise DistributedError(
                "the model has both DistributedDataParallel and fully_shard modules; use one of them."
            )
        refuse_unsharded(modules)
        return ProcessGroup(group_of(sharded), device)
    if not wrapped:
        _refuse_unwrapped()
        return None
    groups = {id(module.process_group): module.process_group for module in wrapped}
    if len(groups) > 1:
        raise DistributedError("the model's DistributedDataParallel modules have different process groups; use one.")
    for attribute, reason in _UNSUPPORTED.items():
        if any(getattr(module, attribute, None) for module in wrapped):
            raise DistributedError(reason)
    if torch.distributed.get_world_size(wrapped[0].process_group) > 1:
        _refuse_sync_batch_norm(modules)
    (group,) = groups.values()
    return ProcessGroup(group, device)


def parallel_modules(modules: Sequence[nn.Module]) -> list[nn.parallel.DistributedDataParallel]:
    """The DistributedDataParallel modules among these."""
    return [module for module in modules if isinstance(module, nn.parallel.DistributedDataParallel)]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without its DistributedDataParallel modules, with the same parameters: what one process trains."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    children = {name: unwrapped(child) for name, child in model._modules.items() if child is not None}
    if all(model._modules[name] is child for name, child in children.items()):
        return model
    other = copy.copy(model)
    other._modules = {**model._modules, **children}
    return other


def wrapped_as(model: nn.Module, bare: nn.Module) -> nn.Module:
    """Wrap a bare copy of a model in DistributedDataParallel modules, in the places where the model has them."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return nn.parallel.DistributedDataParallel(
            wrapped_as(model.module, bare),
            process_group=model.process_group,
            broadcast_buffers=model.broadcast_buffers,
            find_unused_parameters=model.find_unused_parameters,
        )
    done: dict[int, nn.Module] = {}
    for name, child in model._modules.items():
        own = bare._modules[name]
        if child is not None and own is not None:
            bare._modules[name] = done[id(child)] = done.get(id(child)) or wrapped_as(child, own)
    return bare


@contextmanager
def without_reductions(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No collectives in passes of these modules; buffers are rank 0's at the start, as once per update without us."""
    for module in parallel_modules(modules):
        if module.broadcast_buffers and list(module.module.buffers()):
            sync_buffers(module)
    with training_alone(modules):
        yield


@contextmanager
def training_alone(modules: Sequence[nn.Module]) -> Iterator[None]:
    """No collectives in passes of these modules, nor before them: no other rank need come."""
    with ExitStack() as stack:
        for module in parallel_modules(modules):
            stack.enter_context(module.no_sync())
            stack.callback(setattr, module, "require_forward_param_sync", module.require_forward_param_sync)
            module.require_forward_param_sync = False
        yield


def _refuse_unwrapped() -> None:
    size = torch.distributed.get_world_size()
    if size > 1:
        raise DistributedError(
            f"{size} processes are initialized, but no DistributedDataParallel is found in the model, so each would "
            "train its own model. Wrap it: DistributedDataParallel(model); or, if this is intended, pass "
            "distributed=False."
        )


_UNSUPPORTED = {
    "static_graph": "DistributedDataParallel(static_graph=True) is not supported with no_sync(), under which gradients "
    "accumulate: it can stop reducing them in silence. Leave static_graph out.",
    "parameters_to_ignore": "DistributedDataParallel ignores some parameters (parameters_to_ignore), but gradfold "
    "would sum their gradients over the ranks. Freeze them, or do not ignore them.",
    "_comm_hooks": "DistributedDataParallel has a communication hook, which gradfold's one reduction per window would "
    "not call. Leave the hook out.",
}
"""Why a DistributedDataParallel with this attribute is refused."""


def _refuse_sync_batch_norm(modules: Sequence[nn.Module]) -> None:
    if any(isinstance(module, nn.SyncBatchNorm) and module.training for module in modules):
        raise DistributedError(
            "SyncBatchNorm normalizes by one micro-batch of every rank, which is not the batch, and waits for ranks "
            'that have fewer micro-batches. Use nn.BatchNorm layers with batch_norm="exact", which takes the rows of '
            'all ranks, or with "per_micro_batch"; or GroupNorm: gradfold.convert_batch_norm(model), before wrapping.'
        )


def _refuse_foreign(module: nn.Module) -> None:
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    if name.startswith("deepspeed."):
        raise DistributedError(
            "a DeepSpeed engine counts micro-batches and steps by itself. Use its own "
            "gradient_accumulation_steps, or train the bare module under DistributedDataParallel."
        )
    if name.endswith("FullyShardedDataParallel"):
        raise DistributedError(
            "FullyShardedDataParallel (FSDP1) is not supported. Use torch.distributed.fsdp.fully_shard (FSDP2), or "
            "DistributedDataParallel."
        )
