"""Synchronization: which processes train a model together, found in the model, and its own reductions kept quiet.

gradfold reduces gradients once per window, after its last backward pass. So forward *and* backward passes of
DistributedDataParallel modules run under `no_sync`, wherever in the model they are.

Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html (`no_sync`: "the
forward pass should be included inside the context manager").

A sharding: how fully_shard was applied to a model, read from it, to be applied to a copy of it (FSDP2).

Models with shards refuse to be copied. What is read here of torch's own records is private to them.
Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import nn

from gradfold.errors import DistributedError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

__all__: list[str] = []


def sharded_modules(modules: Sequence[nn.Module]) -> list[FSDPModule]:
    """Those to which `torch.distributed.fsdp.fully_shard` was applied."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FSDPModule  # which takes long to import, and only several ranks need

    return [module for module in modules if isinstance(module, FSDPModule)]


def reshard(modules: Sequence[nn.Module]) -> None:
    """Have modules hold shards, which the outermost one does not after a forward pass without a backward pass."""
    for module in sharded_modules(modules):
        module.reshard()


def divide_factor(sharded: Sequence[FSDPModule], size: int) -> float:
    """What fully_shard modules divide gradients by when they sum them over ranks, to be undone in the seeds."""
    groups = [group for module in sharded for group in _parameter_groups(module)]
    factors = {
        float(size if group.gradient_divide_factor is None else group.gradient_divide_factor) for group in groups
    }
    if len(factors) > 1:
        raise DistributedError(f"fully_shard modules divide gradients by different factors: {sorted(factors)}.")
    return factors.pop() if factors else 1.0


def set_reducing(sharded: Sequence[FSDPModule], is_last: bool) -> None:
    """Whether the next backward pass sums gradients over ranks."""
    for module in sharded:
        module.set_requires_gradient_sync(is_last, recurse=False)


def _parameter_groups(module: FSDPModule) -> list[Any]:
    groups: list[Any] = module._get_fsdp_state()._fsdp_param_groups
    return groups


def _group_of(sharded: Sequence[FSDPModule]) -> torch.distributed.ProcessGroup:
    """All data-parallel ranks: those of the mesh, of both its dimensions where shards are replicated (HSDP)."""
    meshes = {group.mesh_info.mesh for module in sharded for group in _parameter_groups(module)}
    if len(meshes) != 1:
        raise DistributedError("the model's fully_shard modules have different device meshes; give them one.")
    (mesh,) = meshes
    group: torch.distributed.ProcessGroup = (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()
    return group


def _refuse_unsharded(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and not hasattr(parameter, "full_tensor"):
                raise DistributedError(
                    f"{type(module).__name__}.{name}, of shape {tuple(parameter.shape)}, is trained, but fully_shard "
                    "was told to ignore it, or not applied around it: nothing sums its gradient over the ranks. Apply "
                    "fully_shard to the whole model in the end, without ignored_params; or freeze it."
                )


_SETTINGS = ("reshard_after_backward", "unshard_in_backward", "reduce_scatter_max_input_buffers", "all_reduce_grads")
"""What `FSDPModule.set_...` has set of a group, where it changes what memory is taken."""


@dataclass(frozen=True)
class FullyShardCall:
    """One call of fully_shard.

    Args:
        names: of the modules that it was applied to, as one group.
        state: torch's record of it.
    """

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


class ShardingRecipe:
    """How fully_shard was applied to a model, innermost calls first.

    Args:
        model: that has shards.

    Raises:
        DistributedError: it cannot be repeated.
    """

    def __init__(self, model: nn.Module) -> None:
        reshard(list(model.modules()))  # else some of its parameters may be those that were gathered
        self._model = model
        self._calls = list(_calls(model))
        for shard in self._shards():
            if shard.is_dtensor:
                raise DistributedError("a model that is tensor-parallel, too, cannot be sharded once more in a copy.")
        self._mesh = next(call.group.mesh_info.mesh for call in self._calls if call.group is not None)

    def whole_parameters(self) -> dict[int, nn.Parameter]:
        """New parameters without contents, as they were before they were sharded, by `id` of the shard."""
        found = {}
        for shard in self._shards():
            sharded = shard.sharded_param
            whole = torch.empty(shard._orig_size, dtype=sharded.dtype, device=shard.device)
            found[id(sharded)] = nn.Parameter(whole, sharded.requires_grad)
        return found

    def copy(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of the model without shards; what `memo` has by `id` stands in, as for `copy.deepcopy`."""
        modules = sharded_modules(list(self._model.modules()))
        for module in modules:  # first all, since modules may know each other
            memo[id(module)] = _bare(module)
        for module in modules:
            memo[id(module)].__dict__.update(copy.deepcopy(_own(module), memo))
        return copy.deepcopy(self._model, memo)

    def apply(self, model: nn.Module) -> dict[int, nn.Parameter]:
        """Shard a copy as the model is; gives its shards by `id` of those of the model."""
        placements = {id(shard.sharded_param): shard.fsdp_placement for shard in self._shards()}
        pairs = zip(self._model.parameters(), model.parameters(), strict=True)
        placed = {whole: placements.get(id(own)) for own, whole in pairs}
        found: dict[int, nn.Parameter] = {}
        for call in self._calls:
            made = self._repeat(call, model, placed)
            found |= {
                id(old.sharded_param): new.sharded_param for old, new in zip(call.shards, made.shards, strict=True)
            }
        self._prefetch(model)
        return found

    def _repeat(self, call: FullyShardCall, model: nn.Module, placed: Mapping[nn.Parameter, Any]) -> FullyShardCall:
        from torch.distributed.fsdp import fully_shard

        modules: Any = [model.get_submodule(name) for name in call.names]
        options: dict[str, Any] = {"mesh": self._mesh}
        if call.group is not None:
            options = {
                "mesh": call.group.mesh_info.mesh,
                "reshard_after_forward": _reshard_after_forward(call.state, call.group),
                "shard_placement_fn": placed.get,
                "offload_policy": call.group.offload_policy,
            }
        ignored = {whole for whole, placement in placed.items() if placement is None}
        target = modules if len(modules) > 1 else modules[0]
        fully_shard(target, mp_policy=call.state._mp_policy, ignored_params=ignored, **options)
        made = FullyShardCall(call.names, modules[0]._get_fsdp_state())
        for name in _SETTINGS if call.group is not None else ():
            setattr(made.group, name, getattr(call.group, name))
        return made

    def _prefetch(self, model: nn.Module) -> None:
        """What is gathered ahead, where the user has said so."""
        modules: dict[int, Any] = {id(call.state): model.get_submodule(call.names[0]) for call in self._calls}
        for call in self._calls:
            module = modules[id(call.state)]
            module.set_modules_to_forward_prefetch([modules[id(one)] for one in call.state._states_to_forward_prefetch])
            module.set_modules_to_backward_prefetch(
                [modules[id(one)] for one in call.state._states_to_backward_prefetch]
            )

    def _shards(self) -> Iterator[Any]:
        for call in self._calls:
            yield from call.shards


def _calls(model: nn.Module) -> Iterator[FullyShardCall]:
    names = {id(module): name for name, module in model.named_modules()}
    states: dict[int, Any] = {}
    for module in reversed(sharded_modules(list(model.modules()))):
        state = module._get_fsdp_state()
        states.pop(id(state), None)  # where it groups several modules, all that is inside them comes first
        states[id(state)] = state
    for state in states.values():
        yield FullyShardCall(tuple(names[id(module)] for module in state._modules), state)


def _reshard_after_forward(state: Any, group: Any) -> bool | int | None:
    if state._auto_reshard_after_forward:
        return None
    after = group.post_forward_mesh_info
    if after is None or after is group.mesh_info:
        return after is not None
    size: int = after.shard_mesh_size
    return size


def _bare(module: FSDPModule) -> nn.Module:
    """An empty object of the class that the module had before."""
    kind: Any = type(module).__mro__[type(module)._orig_cls_mro_index]
    bare: nn.Module = kind.__new__(kind)
    return bare


def _own(module: Any) -> dict[str, Any]:
    """The attributes of a module without what fully_shard has put there."""
    found = {name: one for name, one in vars(module).items() if not name.startswith("__composable_api_state_key")}
    numbers = _hook_numbers(module._get_fsdp_state())
    for name, hooks in found.items():
        if name.endswith("_hooks") and isinstance(hooks, dict):
            found[name] = type(hooks)((number, hook) for number, hook in hooks.items() if number not in numbers)
    return found


def _hook_numbers(state: Any) -> set[int]:
    handles = (state._pre_forward_hook_handle, state._post_forward_hook_handle)
    return {one.id for handle in handles for one in getattr(handle, "handles", (handle,))}


def gathered_parameters(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The whole parameters that stand in for shards while passes run; none before the first forward pass."""
    groups = [group for module in sharded_modules(modules) for group in module._get_fsdp_state()._fsdp_param_groups]
    shards = [shard for group in groups for shard in group.fsdp_params]
    return [shard._unsharded_param for shard in shards if hasattr(shard, "_unsharded_param")]


def shard(model: nn.Module, layers: str | None) -> None:
    """Apply fully_shard as its documentation advises: to each module of a list, and to the model.

    Args:
        model: that is changed.
        layers: the name of the list in it; None: to the model alone.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in [] if layers is None else model.get_submodule(layers).children():
        fully_shard(layer)
    fully_shard(model)
