"""What this package calls of torch that is not public, as seen in torch 2.13 on a CPU, and what happens without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gradfold.errors import DistributedError

if TYPE_CHECKING:
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


# Below: the records that fully_shard keeps. Without them models with shards cannot be copied, so there are no plans, no
# "auto" and no verify of them.


def fully_shard_state(module: Any) -> Any:
    """The record of the fully_shard call that this module is in."""
    return module._get_fsdp_state()


def parameter_groups(module: FSDPModule) -> list[Any]:
    """The records of the parameters that are gathered together."""
    groups: list[Any] = fully_shard_state(module)._fsdp_param_groups
    return groups


def grouped_modules(state: Any) -> list[nn.Module]:
    """The modules that one fully_shard call was applied to."""
    return list(state._modules)


def flat(mesh: Any) -> Any:
    """A device mesh with one dimension, of the same ranks."""
    return mesh if mesh.ndim == 1 else mesh._flatten()


def whole_size(shard: Any) -> Any:
    """The shape of a parameter before it was sharded."""
    return shard._orig_size


def gathered(shard: Any) -> nn.Parameter | None:
    """The whole parameter that stands in for a shard while passes run; None before the first forward pass."""
    whole: nn.Parameter | None = getattr(shard, "_unsharded_param", None)
    return whole


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
    def precision(self) -> Any:
        """The MixedPrecisionPolicy."""
        return self.state._mp_policy

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

    @property
    def prefetched(self) -> tuple[list[Any], list[Any]]:
        """The states of the modules that are gathered ahead in forward and in backward passes."""
        return self.state._states_to_forward_prefetch, self.state._states_to_backward_prefetch

    def take_settings(self, other: FullyShardCall) -> None:
        """Have the settings of another call that `FSDPModule.set_...` changes and that change what memory is taken."""
        for name in _SETTINGS if other.group is not None else ():
            setattr(self.group, name, getattr(other.group, name))


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
