"""The first coupled layer: where in a model the rows of a batch first depend on each other.

The first module whose inputs or outputs change in other rows when one row is changed is where, or just behind.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, map_tensors
from gradfold.self_check.layers import LayerCall, changed, copied, first_difference, traced_layers
from gradfold.self_check.torch_private import tree_leaves
from gradfold.verification.setup import Setup

_KEPT_APART = "All layers keep the rows apart, so it is what loss_fn does with their outputs."


def find_first_coupled_layer(setup: Setup) -> tuple[str, str | None]:
    """Where one row first changes others, as a sentence, and the layer's name; an empty one where that is not seen."""
    try:
        before = _trace(setup)
        for row in dict.fromkeys([0, setup.num_rows - 1, setup.num_rows // 2]):
            differ = partial(_reaches_others, row=row, num_rows=setup.num_rows)
            found = first_difference(before, _trace(setup, row), differ)
            if found is not None:
                return _describe(before, found)
    except Exception:  # a model that cannot be traced: the verdict stands without the place
        return "", None
    with suppress(Exception):
        return _find_backwards(setup), None
    return _KEPT_APART, None


def _find_backwards(setup: Setup) -> str:
    """Rows that depend on each other in the backward pass only, by a custom `autograd.Function` or a hook.

    A gradient that starts in one row of what the last layer gave, and arrives in others.
    """
    calls = [one for one in _trace(setup, keep=_with_graph) if one.is_output and one.tensors]
    outputs = [one for one in calls if setup.num_rows in one.tensors[0].shape]
    last = outputs[-1].tensors[0]
    grad_output = torch.zeros_like(last)
    row = grad_output.select(last.shape.index(setup.num_rows), 0)
    row.copy_(torch.linspace(1, 2, row.numel()).view(row.shape))
    for one, following in reversed(list(pairwise(outputs))):
        (gradient,) = torch.autograd.grad(last, one.tensors[0], grad_output, retain_graph=True, allow_unused=True)
        if gradient is None or not _reaches_others(gradient, torch.zeros_like(gradient), 0, setup.num_rows):
            continue
        text = f"It happens in the backward pass only, between {one} and {following}: look for a custom "
        return f"{text}autograd.Function or a hook."
    return _KEPT_APART


def _trace(
    setup: Setup, changed_row: int | None = None, keep: Callable[[Any], list[Tensor]] = copied
) -> list[LayerCall]:
    """Every module's inputs and outputs, in order; `keep` takes the tensors from them."""
    model = setup.fresh_model()
    with setup.running(), traced_layers(model, keep) as calls:
        batch = setup.whole_batch()
        setup.strategy.probe_loss(
            model, batch if changed_row is None else _changed_in(batch, changed_row, setup.num_rows)
        )
    return calls


def _with_graph(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _changed_in(batch: Batch, row: int, num_rows: int) -> Batch:
    """A batch that differs in this row: noise on real numbers, another row's values for the others."""
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

    return map_tensors(change, batch)


def _reaches_others(a: Tensor, b: Tensor, row: int, num_rows: int) -> bool:
    """Whether values of other rows differ, in whatever dimension the rows are; False where there is none."""
    if a.shape != b.shape:
        raise ValueError(f"the shapes {a.shape} and {b.shape} depend on the values of a row")
    found = changed(b, a)
    if not bool(found.any()):
        return False
    readings = [found.movedim(dim, 0).flatten(1) for dim in range(a.dim()) if a.shape[dim] % num_rows == 0]
    rows_in_order = [reading.reshape(num_rows, -1) for reading in readings]
    rows_in_turn = [reading.view(-1, num_rows, reading.shape[1]).transpose(0, 1).flatten(1) for reading in readings]
    others = [index for index in range(num_rows) if index != row]
    reaches = [bool(reading[others].any()) for reading in rows_in_order + rows_in_turn]
    return bool(reaches) and all(reaches)


def _describe(calls: list[LayerCall], index: int) -> tuple[str, str | None]:
    here, last = calls[index], calls[index - 1] if index else None
    if not here.is_output:
        caller = "loss_fn" if here.caller is None else _forward_of(calls, here.caller)
        return f"It first happens in {caller}, before {here} is called.", None
    if last is not None and not last.is_output and last.name == here.name:
        return f"It first happens in the layer {here}.", here.name
    after = "" if last is None else f", after {last}"
    return f"It first happens in {_forward_of(calls, here.name)}{after}.", here.name


def _forward_of(calls: list[LayerCall], name: str) -> str:
    module = next(one.module for one in calls if one.name == name)
    return f"forward of {type(module).__name__}" + (f" ({name!r})" if name else "")
