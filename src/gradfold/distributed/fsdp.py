"""fully_shard (FSDP2): its modules in a model, when they reduce gradients, and how it was applied.

A model with shards cannot be copied. So a recipe is read from it, and applied to a copy without shards.
Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import nn

from gradfold.distributed.torch_private import (
    bare_instance,
    fully_shard_calls,
    own_attributes,
    parameter_groups,
    whole_parameter,
)
from gradfold.errors import DistributedError, OptionError
from gradfold.messages import join_names

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


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
    """What fully_shard modules divide gradients by when they sum them over ranks, to be undone in `grad_output`."""
    groups = [group for module in sharded for group in parameter_groups(module)]
    own = {group.gradient_divide_factor for group in groups}
    factors = {float(size if factor is None else factor) for factor in own}
    if len(factors) > 1:
        raise DistributedError(f"fully_shard modules divide gradients by different factors: {sorted(factors)}.")
    return factors.pop() if factors else 1.0


def set_reducing(sharded: Sequence[FSDPModule], is_last: bool) -> None:
    """Whether the next backward pass sums gradients over ranks."""
    for module in sharded:
        module.set_requires_gradient_sync(is_last, recurse=False)


def refuse_unsharded(modules: Sequence[nn.Module]) -> None:
    """Raise DistributedError where a trained parameter has no shards."""
    for module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and not hasattr(parameter, "full_tensor"):
                raise DistributedError(
                    f"{type(module).__name__}.{name}, of shape {tuple(parameter.shape)}, is trained, but fully_shard "
                    "ignores it or was not applied around it: no reduction sums its gradient over the ranks. Apply "
                    "fully_shard to the whole model in the end, without ignored_params; or freeze it."
                )


def refuse_small_dtypes(model: nn.Module, sums: torch.dtype | None, owner: str) -> None:
    """Raise OptionError where `owner` would sum gradients in a smaller dtype than `sums`, if that is not None."""
    small = [name for name, one in model.named_parameters() if one.requires_grad and one.dtype.itemsize < 4]
    if small and sums is not None:
        remedy = {
            "fully_shard": "in bfloat16: fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, "
            "reduce_dtype=torch.float32))",
        }.get(owner, 'under autocast: precision="bf16"')
        raise OptionError(
            f"{join_names(small, 3)}: {owner} sums the gradients of parameters in a small dtype in that dtype, "
            "where a sum over 128 micro-batches is off by 1 % in bfloat16. Keep the parameters in float32, and compute "
            f"{remedy}. Precision(accumulate_dtype=None) accepts it."
        )


class ShardingRecipe:
    """How fully_shard was applied to a model, innermost calls first; DistributedError if that cannot be repeated."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        reshard(modules)  # else some of its parameters may be those that were gathered
        self._model = model
        self._calls = fully_shard_calls(model, sharded_modules(modules))
        for shard in self._shards():
            if shard.is_dtensor:
                raise DistributedError("fully_shard of a tensor-parallel model cannot be repeated on a copy.")
        self._mesh = next((call.group.mesh_info.mesh for call in self._calls if call.group is not None), None)

    def whole_parameters(self) -> dict[int, nn.Parameter]:
        """New parameters without contents, as they were before they were sharded, by `id` of the shard."""
        return {id(shard.sharded_param): whole_parameter(shard) for shard in self._shards()}

    def copy(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of the model without shards; what `memo` has by `id` stands in, as for `copy.deepcopy`."""
        modules = sharded_modules(list(self._model.modules()))
        for module in modules:  # first all, since modules may know each other
            memo[id(module)] = bare_instance(module)
        for module in modules:
            memo[id(module)].__dict__.update(copy.deepcopy(own_attributes(module), memo))
        return copy.deepcopy(self._model, memo)

    def apply(self, model: nn.Module) -> dict[int, nn.Parameter]:
        """Shard a copy as the model is; gives its shards by `id` of those of the model."""
        placements = {id(shard.sharded_param): shard.fsdp_placement for shard in self._shards()}
        pairs = zip(self._model.parameters(), model.parameters(), strict=True)
        placed = {whole: placements.get(id(own)) for own, whole in pairs}
        found: dict[int, nn.Parameter] = {}
        for call in self._calls:
            made = call.repeat(model, placed, self._mesh)
            shards = zip(call.shards, made.shards, strict=True)
            found |= {id(old.sharded_param): new.sharded_param for old, new in shards}
        modules = {id(call.state): model.get_submodule(call.names[0]) for call in self._calls}
        for call in self._calls:
            call.repeat_prefetch(modules)
        return found

    def _shards(self) -> Iterator[Any]:
        for call in self._calls:
            yield from call.shards


def shard(model: nn.Module, layers: str | None) -> None:
    """Apply fully_shard as its documentation advises: to each module of the list of this name, and to the model."""
    from torch.distributed.fsdp import fully_shard

    for layer in [] if layers is None else model.get_submodule(layers).children():
        fully_shard(layer)
    fully_shard(model)
