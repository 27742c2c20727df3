"""A coupling: where in a model the rows of a batch first see each other.

One row is changed, and the batch runs again with the same random numbers. The first module whose inputs or outputs
changed in other rows is where it happens, or just behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradfold.batch.nesting import Batch, map_tensors
from gradfold.verification.setup import Setup

__all__: list[str] = []

_ROUNDINGS = 1000  # by how many of them a value must differ in order to count as changed


@dataclass(frozen=True)
class CoupledLayer:
    """Where it first happens.

    Attributes:
        text: a sentence.
        layer: name of the layer, where it is one.
    """

    text: str
    layer: str | None


@dataclass(frozen=True)
class _LayerPass:
    """Tensors on their way into a module or out of it."""

    module: nn.Module
    name: str
    is_output: bool
    caller: str | None  # the module whose forward was running; None: loss_fn
    tensors: list[Tensor]


def find_first_coupled_layer(specimen: Setup) -> CoupledLayer | None:
    """Look for the place where one row first changes others; None where that cannot be seen."""
    try:
        before = _passages(specimen, lambda batch: batch)
        for row in dict.fromkeys([0, specimen.num_rows - 1, specimen.num_rows // 2]):
            changed = _with_row_changed(row, specimen.num_rows)
            found = _first_coupled(before, _passages(specimen, changed), row, specimen.num_rows)
            if found is not None:
                return _describe(before, found)
    except Exception:  # a model that does not bear it: the verdict stands without the place
        return None
    try:
        backwards = _find_backwards(specimen)
    except Exception:
        backwards = None
    return backwards or CoupledLayer(
        "All layers keep the rows apart, so it is what loss_fn does with their outputs.", None
    )


def _find_backwards(specimen: Setup) -> CoupledLayer | None:
    """Rows that see each other in the backward pass only, by an `autograd.Function` or a hook of the user's own.

    A gradient that starts in one row of what the last layer gave, and arrives in others.
    """
    outputs = [one for one in _passages(specimen, lambda batch: batch, keep=_with_graph) if one.is_output]
    outputs = [one for one in outputs if one.tensors and specimen.num_rows in one.tensors[0].shape]
    last = outputs[-1].tensors[0]
    seed = torch.zeros_like(last)
    row = seed.select(last.shape.index(specimen.num_rows), 0)
    row.copy_(torch.linspace(1, 2, row.numel()).view(row.shape))
    for one, following in reversed(list(pairwise(outputs))):
        (gradient,) = torch.autograd.grad(last, one.tensors[0], seed, retain_graph=True, allow_unused=True)
        if gradient is None or not _reaches_others(gradient, torch.zeros_like(gradient), 0, specimen.num_rows):
            continue
        where = f"between {_quoted(one)} and {_quoted(following)}"
        return CoupledLayer(f"It happens in the backward pass only, {where}: is there a backward of your own?", None)
    return None


def _passages(
    specimen: Setup, change: Callable[[Batch], Batch], keep: Callable[[Any], list[Tensor]] | None = None
) -> list[_LayerPass]:
    """Every module's inputs and outputs, in order; `keep` takes the tensors from them."""
    keep = keep or _copies
    model = specimen.fresh_model()
    found: list[_LayerPass] = []
    running: list[str] = []

    def watch(name: str, module: nn.Module) -> None:
        def enter(_: nn.Module, arguments: Any, keywords: Any) -> None:
            caller = running[-1] if running else None
            found.append(_LayerPass(module, name, False, caller, keep((arguments, keywords))))
            running.append(name)

        def leave(_: nn.Module, __: Any, outputs: Any) -> None:
            running.pop()
            found.append(_LayerPass(module, name, True, running[-1] if running else None, keep(outputs)))

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)

    for name, module in model.named_modules():
        watch(name, module)
    with specimen.running():
        batch = change(specimen.whole_batch())
        specimen.examined_loss_fn(model, batch)
    return found


def _with_graph(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _copies(values: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_sparse]


def _with_row_changed(row: int, num_rows: int) -> Callable[[Batch], Batch]:
    """A function that changes this row of a batch: noise on real numbers, another row's values for the others."""
    generator = torch.Generator().manual_seed(0)

    def change(tensor: Tensor) -> Tensor:
        if tensor.dim() == 0 or len(tensor) != num_rows or tensor.layout is not torch.strided:
            return tensor
        tensor = tensor.detach().clone()
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape[1:], generator=generator, dtype=torch.float32).to(tensor)
            tensor[row] += 3 * noise * (tensor.std() if tensor.numel() > 1 else 1.0)
        else:
            tensor[row] = tensor[row - (num_rows + 1) // 2]
        return tensor

    return lambda batch: map_tensors(change, batch)


def _first_coupled(before: list[_LayerPass], after: list[_LayerPass], row: int, num_rows: int) -> int | None:
    for index, (one, other) in enumerate(zip(before, after, strict=False)):
        if one.name != other.name or [a.shape for a in one.tensors] != [b.shape for b in other.tensors]:
            return None
        if any(_reaches_others(a, b, row, num_rows) for a, b in zip(one.tensors, other.tensors, strict=True)):
            return index
    return None


def _reaches_others(a: Tensor, b: Tensor, row: int, num_rows: int) -> bool:
    """Whether values of other rows differ, in whatever dimension the rows are; False where there is none."""
    if a.is_floating_point() or a.is_complex():
        least = _ROUNDINGS * torch.finfo(a.dtype).eps * float(a.abs().max()) if a.numel() else 0.0
        changed = (a - b).abs() > least
    else:
        changed = a != b
    if not bool(changed.any()):
        return False
    readings = [changed.movedim(dim, 0).flatten(1) for dim in range(a.dim()) if a.shape[dim] % num_rows == 0]
    rows_in_order = [reading.reshape(num_rows, -1) for reading in readings]
    rows_in_turn = [reading.view(-1, num_rows, reading.shape[1]).transpose(0, 1).flatten(1) for reading in readings]
    others = [index for index in range(num_rows) if index != row]
    found = [bool(reading[others].any()) for reading in rows_in_order + rows_in_turn]
    return bool(found) and all(found)


def _describe(passages: list[_LayerPass], index: int) -> CoupledLayer:
    here, last = passages[index], passages[index - 1] if index else None
    if not here.is_output:
        caller = "loss_fn" if here.caller is None else _forward_of(passages, here.caller)
        return CoupledLayer(f"It first happens in {caller}, before {_quoted(here)} is called.", None)
    if last is not None and not last.is_output and last.name == here.name:
        return CoupledLayer(f"It first happens in the layer {_quoted(here)}.", here.name)
    after = "" if last is None else f", after {_quoted(last)}"
    return CoupledLayer(f"It first happens in {_forward_of(passages, here.name)}{after}.", here.name)


def _forward_of(passages: list[_LayerPass], name: str) -> str:
    module = next(one.module for one in passages if one.name == name)
    return f"forward of {type(module).__name__}" + (f" ({name!r})" if name else "")


def _quoted(passage: _LayerPass) -> str:
    return f"{passage.name!r} ({type(passage.module).__name__})" if passage.name else type(passage.module).__name__
