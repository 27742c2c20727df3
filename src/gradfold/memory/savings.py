"""A memory saving: a change to a dry run that takes less memory, at a cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from gradfold.distributed.fsdp import sharded_modules
from gradfold.memory.dry_run import DryRun
from gradfold.precision import Precision


@dataclass(frozen=True)
class MemorySaving:
    """A dry run with one change, and what that costs, with the line that makes it."""

    name: str
    cost: str
    dry_run: DryRun


def savings_of(dry_run: DryRun, device: torch.device) -> Iterator[MemorySaving]:
    """The changes that apply to a model on this device."""
    model, precision, reduces_once = dry_run.model, dry_run.precision, dry_run.reduces_once
    dtypes = {parameter.dtype for parameter in model.parameters()}
    layers = longest_list(model)
    if layers is not None:
        yield MemorySaving(
            f"checkpoint {layers}",
            f"each module of {layers!r} runs twice: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)",
            replace(dry_run, checkpointed=layers),
        )
    if precision.compute is None and torch.float32 in dtypes:
        yield MemorySaving(
            "bf16 autocast",
            'activations are rounded to 8 bits: precision="bf16"',
            replace(dry_run, precision=replace(precision, compute=torch.bfloat16)),
        )
    if precision.accumulate_dtype is not None and dtypes & {torch.bfloat16, torch.float16}:
        yield MemorySaving(
            "narrow sums",
            "gradients are summed in the parameters' own dtype, off by 1 % over 128 micro-batches: "
            "precision=Precision(accumulate_dtype=None)",
            replace(dry_run, precision=Precision(precision.compute, accumulate_dtype=None)),
        )
    if sharded_modules(list(model.modules())):
        often = (
            'gradients are reduced once per micro-batch, and no rank keeps whole ones: fsdp_reduce="per_micro_batch"'
        )
        once = (
            'gradients are reduced once per window, and each rank keeps whole ones until then: fsdp_reduce="per_window"'
        )
        yield MemorySaving(
            *(("reduce every time", often) if reduces_once else ("reduce once", once)),
            replace(dry_run, reduces_once=not reduces_once),
        )
    if device.type != "cpu":
        yield MemorySaving(
            "offload saved tensors",
            "saved tensors travel to the host and back: with torch.autograd.graph.save_on_cpu(pin_memory=True)",
            replace(dry_run, is_offloading=True),
        )


def longest_list(model: nn.Module) -> str | None:
    """The name of the `nn.ModuleList` or `nn.Sequential` inside the model whose modules hold most parameters.

    Those of one kind and more than one, as the layers of a network are; None where there is none.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and name:
            kinds = {type(one) for one in module}
            if len(kinds) == 1 and all(any(True for _ in one.children()) for one in module):
                found[name] = sum(one.numel() for one in module.parameters())
    return max(found, key=lambda name: found[name], default=None)
