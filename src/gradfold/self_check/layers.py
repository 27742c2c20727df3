"""A layer tracer: what goes into and out of every module in one forward pass, and whether two passes differ there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.self_check.torch_private import tree_leaves

_ROUNDINGS = 1000  # by how many of them a value must differ in order to count as changed


@dataclass(frozen=True)
class LayerCall:
    """Tensors on their way into a module or out of it."""

    name: str  # of the module in the model; "" for the model itself
    module: nn.Module
    is_output: bool
    caller: str | None  # name of the module whose forward was running; None in loss_fn
    tensors: list[Tensor]

    def __str__(self) -> str:
        kind = type(self.module).__name__
        return f"{self.name!r} ({kind})" if self.name else kind


def copied(values: Any) -> list[Tensor]:
    """Copies of the dense tensors in a nesting."""
    return [leaf.detach().clone() for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_sparse]


@contextmanager
def traced_layers(model: nn.Module, keep: Callable[[Any], list[Tensor]] = copied) -> Iterator[list[LayerCall]]:
    """A list that grows by the inputs and outputs of every module in the block, in order; `keep` takes the tensors."""
    calls: list[LayerCall] = []
    running: list[str | None] = [None]

    def enter(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(LayerCall(name, module, False, running[-1], keep((args, kwargs))))
        running.append(name)

    def leave(name: str, module: nn.Module, args: Any, outputs: Any) -> None:
        running.pop()
        calls.append(LayerCall(name, module, True, running[-1], keep(outputs)))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(partial(leave, name)))
        yield calls


def first_difference(
    before: Iterable[LayerCall], after: Iterable[LayerCall], differ: Callable[[Tensor, Tensor], bool]
) -> int | None:
    """The number of the first call whose tensors differ in two traces; None where there is none before they part."""
    for number, (one, other) in enumerate(zip(before, after, strict=False)):
        if (one.name, one.is_output) != (other.name, other.is_output):
            return None
        if any(map(differ, one.tensors, other.tensors)):
            return number
    return None


def changed(values: Tensor, reference: Tensor) -> Tensor:
    """Where values differ from a reference by more than rounding."""
    if not (values.is_floating_point() or values.is_complex()):
        return values != reference
    size = float(reference.abs().max()) if reference.numel() else 0.0
    bound = _ROUNDINGS * torch.finfo(reference.dtype).eps * size
    return ((values - reference).abs() > bound) | (values.isnan() != reference.isnan())
