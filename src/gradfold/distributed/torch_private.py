"""What this package calls of torch that is not public, as seen in torch 2.13 on a CPU, and what happens without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradfold.errors import DistributedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.fsdp import FSDPModule


def fake_store() -> Any:
    """The store of the backend "fake" of torch's own tests. Without it: no plans for more ranks than are running."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # takes long to import

    return FakeStore()


def is_shared(tensor: Tensor) -> bool:
    """Whether others than Python hold a tensor (`_use_count`). Without it: see `process_group.wait_for_threads`."""
    return tensor._use_count() > 1  # type: ignore[attr-defined, no-any-return]


def sync_buffers(module: nn.parallel.DistributedDataParallel) -> None:
    """Give every rank the buffers of rank 0 (`_sync_buffers`). Without it: a broadcast of each buffer."""
    module._sync_buffers()  # type: ignore[no-untyped-call]


def end_reduction(module: nn.parallel.DistributedDataParallel) -> bool:
    """End a backward pass that sums gradients; gives whether it has summed all (`_check_reducer_finalized`).

    After the first one buckets are rebuilt by a collective (`_rebuild_buckets`), else in the next forward pass, which
    not every rank may run. Without these: gradients are summed after the last backward pass.
    """
    try:
        module.reducer._check_reducer_finalized()
    except RuntimeError:
        return False
    module.reducer._rebuild_buckets()
    return module.require_forward_param_sync  # which a forward pass sets that prepares for sums


def drop_reduction(module: nn.parallel.DistributedDataParallel) -> None:
    """Have a module forget a backward pass that failed (`Reducer._reset_state`). Without it: as `end_reduction`."""
    module.reducer._reset_state()


# Below: the records that fully_shard keeps. Without them models with shards cannot be copied, so there are no plans, no
# "auto" and no verify of them.


def fully_shard_state(module: Any) -> Any:
    """The record of the fully_shard call that this module is in."""
    return module._get_fsdp_state()


def parameter_groups(module: FSDPModule) -> list[Any]:
    """The records of the parameters that are gathered together."""
    groups: list[Any] = fully_shard_state(module)._fsdp_param_groups
    return groups


def group_of(sharded: Sequence[FSDPModule]) -> ProcessGroup:
    """All data-parallel ranks: those of the mesh, of both its dimensions where shards are replicated (HSDP)."""
    meshes = {group.mesh_info.mesh for module in sharded for group in parameter_groups(module)}
    if len(meshes) != 1:
        raise DistributedError("the model's fully_shard modules have different device meshes; use one.")
    (mesh,) = meshes
    group: ProcessGroup = (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()
    return group


def groups_of(sharded: Sequence[FSDPModule]) -> list[ProcessGroup]:
    """The process groups in which modules gather parameters and sum gradients, each once."""
    meshes = {group.mesh_info.mesh for module in sharded for group in parameter_groups(module)}
    return [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]


def default_store() -> Any:
    """The store of the processes (`_get_default_store`). Without it: ranks that fail alone are not told of."""
    return torch.distributed.distributed_c10d._get_default_store()


def whole_parameter(shard: Any) -> nn.Parameter:
    """A new parameter without contents, as it was before it was sharded."""
    sharded = shard.sharded_param
    return nn.Parameter(torch.empty(shard._orig_size, dtype=sharded.dtype, device=shard.device), sharded.requires_grad)


def gathered_parameters(sharded: Sequence[FSDPModule]) -> list[nn.Parameter]:
    """The whole parameters that stand in for shards while passes run; none before the first forward pass."""
    groups = [group for module in sharded for group in parameter_groups(module)]
    found = [getattr(shard, "_unsharded_param", None) for group in groups for shard in group.fsdp_params]
    return [whole for whole in found if whole is not None]


def drop_turn(sharded: Sequence[FSDPModule]) -> None:
    """Have modules forget a pass that failed, with the sums of earlier ones that are not reduced yet.

    They hold shards again. `reset_iter_state` is public, but must be called on outermost modules alone (`_is_root`).
    """
    for module in sharded:
        if fully_shard_state(module)._is_root is not False:
            module.reset_iter_state()
        for group in parameter_groups(module):
            for shard in group.fsdp_params:
                shard.unsharded_accumulated_grad = None
    for whole in gathered_parameters(sharded):
        whole.grad = None


# What `FSDPModule.set_...` changes and that changes what memory is taken.
_SETTINGS = ("reshard_after_backward", "unshard_in_backward", "reduce_scatter_max_input_buffers", "all_reduce_grads")


@dataclass(frozen=True)
class FullyShardCall:
    """One call of fully_shard: the names of the modules it was applied to, as one group, and torch's record of it."""

    names: tuple[str, ...]
    state: Any

    @property
    def group(self) -> Any | None:
        """Of the parameters that are gathered together; None where inner calls have taken all."""
        groups = self.state._fsdp_param_groups
        if len(groups) > 1 or any(group.mesh_info.is_spmd_mesh for group in groups):
            raise DistributedError(
                "a fully_shard call with more than one mesh cannot be repeated on a copy of the model."
            )
        return groups[0] if groups else None

    @property
    def shards(self) -> list[Any]:
        """Torch's records of its parameters."""
        return [] if self.group is None else list(self.group.fsdp_params)

    @property
    def reshard_after_forward(self) -> bool | int | None:
        """As it was passed to fully_shard, of a call with a group."""
        if self.state._auto_reshard_after_forward or self.group is None:
            return None
        after = self.group.post_forward_mesh_info
        if after is None or after is self.group.mesh_info:
            return after is not None
        size: int = after.shard_mesh_size
        return size

    def repeat(self, model: nn.Module, placed: Mapping[nn.Parameter, Any], mesh: Any) -> FullyShardCall:
        """The same call on a copy; `placed`: how its parameters are sharded, if at all; `mesh`: without a group."""
        from torch.distributed.fsdp import fully_shard

        modules: Any = [model.get_submodule(name) for name in self.names]
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": self.state._mp_policy}
        if self.group is not None:
            options |= {
                "mesh": self.group.mesh_info.mesh,
                "reshard_after_forward": self.reshard_after_forward,
                "shard_placement_fn": placed.get,
                "offload_policy": self.group.offload_policy,
            }
        ignored = {whole for whole, placement in placed.items() if placement is None}
        fully_shard(modules if len(modules) > 1 else modules[0], ignored_params=ignored, **options)
        made = FullyShardCall(self.names, fully_shard_state(modules[0]))
        for name in _SETTINGS if self.group is not None else ():
            setattr(made.group, name, getattr(self.group, name))
        return made

    def repeat_prefetch(self, modules: Mapping[int, Any]) -> None:
        """What is gathered ahead, where the user has said so; `modules`: of the copy, by `id` of the calls' records."""
        module, state = modules[id(self.state)], self.state
        module.set_modules_to_forward_prefetch([modules[id(one)] for one in state._states_to_forward_prefetch])
        module.set_modules_to_backward_prefetch([modules[id(one)] for one in state._states_to_backward_prefetch])


def fully_shard_calls(model: nn.Module, sharded: Sequence[FSDPModule]) -> list[FullyShardCall]:
    """The calls of fully_shard that were made on a model with these modules, innermost first."""
    names = {id(module): name for name, module in model.named_modules()}
    states: dict[int, Any] = {}
    for module in reversed(sharded):
        state = fully_shard_state(module)
        states.pop(id(state), None)  # where it groups several modules, all that is inside them comes first
        states[id(state)] = state
    return [FullyShardCall(tuple(names[id(one)] for one in state._modules), state) for state in states.values()]


def bare_instance(module: FSDPModule) -> nn.Module:
    """An empty object of the class that the module had before."""
    kind: Any = type(module).__mro__[type(module)._orig_cls_mro_index]
    bare: nn.Module = kind.__new__(kind)
    return bare


def own_attributes(module: Any) -> dict[str, Any]:
    """The attributes of a module without what fully_shard has put there."""
    found = {name: one for name, one in vars(module).items() if not name.startswith("__composable_api_state_key")}
    numbers = _hook_numbers(fully_shard_state(module))
    for name, hooks in found.items():
        if name.endswith("_hooks") and isinstance(hooks, dict):
            found[name] = type(hooks)((number, hook) for number, hook in hooks.items() if number not in numbers)
    return found


def _hook_numbers(state: Any) -> set[int]:
    handles = (state._pre_forward_hook_handle, state._post_forward_hook_handle)
    return {one.id for handle in handles for one in getattr(handle, "handles", (handle,))}
