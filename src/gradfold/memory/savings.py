"""A lever: a change to a program that takes less memory, at a price."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from gradfold.distributed.fsdp import sharded_modules
from gradfold.memory.dry_run import Program
from gradfold.precision import Precision

__all__: list[str] = []


@dataclass(frozen=True)
class MemorySaving:
    """One change.

    Args:
        name: for a table.
        price: what it costs, and how to pull it.
        program: with the change.
    """

    name: str
    price: str
    program: Program


def levers_of(program: Program, device: torch.device) -> Iterator[MemorySaving]:
    """What can be changed about a program for this device."""
    layers = longest_list(program.model)
    if layers is not None:
        yield MemorySaving(
            f"checkpoint {layers}",
            f"each module of {layers!r} runs twice: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)",
            replace(program, prepare=partial(_checkpoint_all, layers)),
        )
    is_wide = any(one.dtype == torch.float32 for one in program.model.parameters())
    if program.precision.compute is None and is_wide:
        yield MemorySaving(
            "bf16 autocast",
            'activations are rounded to 8 bits: precision="bf16"',
            replace(program, precision=replace(program.precision, compute=torch.bfloat16)),
        )
    if program.precision.accumulate_dtype is not None and any(_is_narrow(one) for one in program.model.parameters()):
        yield MemorySaving(
            "narrow sums",
            "gradients are summed in the parameters' own dtype, off by 1 % over 128 micro-batches: "
            "precision=Precision(accumulate_dtype=None)",
            replace(program, precision=Precision(program.precision.compute, accumulate_dtype=None)),
        )
    if sharded_modules(list(program.model.modules())):
        yield _of_shards(program)
    if device.type != "cpu":
        yield MemorySaving(
            "offload saved tensors",
            "saved tensors travel to the host and back: with torch.autograd.graph.save_on_cpu(pin_memory=True)",
            replace(program, around=offloaded),
        )


def _of_shards(program: Program) -> MemorySaving:
    if program.reduces_once:
        name, price = (
            "reduce every time",
            "gradients travel once per micro-batch, and no rank keeps whole ones: ranks=None",
        )
    else:
        name, price = (
            "reduce once",
            'gradients travel once per window, and every rank keeps whole ones until then: ranks="reduce_once"',
        )
    return MemorySaving(name, price, replace(program, reduces_once=not program.reduces_once))


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


def _checkpoint_all(name: str, model: nn.Module) -> None:
    for layer in model.get_submodule(name).children():
        layer.forward = _Checkpointed(layer.forward)


class _Checkpointed:
    """A forward pass that is run again in the backward pass."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)


def offloaded() -> AbstractContextManager[Any]:
    """As `save_on_cpu`, on fake tensors: what is saved is off the device until it is needed."""
    return saved_tensors_hooks(_off, _on)


def _off(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _on(saved: tuple[Any, ...]) -> Tensor:
    shape, stride, dtype, device = saved
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _is_narrow(parameter: nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)
