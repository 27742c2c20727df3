"""What a statistic leaves on the model (a counter in a buffer, an auxiliary loss in an attribute) and the loss reads.

The loss runs once, when statistics of all micro-batches are there and the model is put back, so it reads old values.
Many statistics leave something that no loss reads (running statistics). The loss is tried with and without it, which
tells; each change by itself then tells the name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradfold.errors import NotDecomposableError, is_out_of_memory
from gradfold.messages import join_names
from gradfold.self_check.comparison import tolerance_of
from gradfold.state.attributes import keep_contents
from gradfold.state.rng import RandomStates
from gradfold.state.snapshot import restored_modules

LeftValue: TypeAlias = "tuple[dict[str, Any], str, Any]"
"""A buffer or an attribute of a module: the dict that holds it, its key there, and the value or a copy of it."""


def left_values(model: nn.Module, names: Collection[str]) -> dict[str, LeftValue]:
    """What the buffers and attributes of these names are now."""
    return {
        name: (place, key, value if (contents := keep_contents(value)) is None else contents.copy)
        for path, module in model.named_modules()
        for place in (vars(module), module._buffers)
        for key, value in place.items()
        if (name := f"{path}.{key}".lstrip(".")) in names
    }


def refuse_left_state(model: nn.Module, left: Mapping[str, LeftValue], run: Callable[[], list[Tensor]]) -> None:
    """Raise NotDecomposableError where `run`, which gives a loss and its gradients, depends on what was left."""
    begin = RandomStates.record(model.parameters())

    def run_with(names: Collection[str]) -> list[Tensor] | None:
        with restored_modules(model):
            for place, key, value in map(left.__getitem__, names):
                place[key] = value
            try:
                return run()
            except Exception as error:  # the window itself will meet it, or not
                if is_out_of_memory(error):
                    raise
                return None
            finally:
                begin.restore()

    try:
        old = run_with(())
        if old is None or _are_same(old, run_with(left)) or not _are_same(old, run_with(())):
            return
        read = [name for name in left if not _are_same(old, run_with([name]))] or list(left)
    except Exception as error:
        if is_out_of_memory(error):
            return  # not known, then; the window itself will find out what fits
        raise
    raise NotDecomposableError(
        f"loss(model, statistics) of the TwoPhaseLoss reads {join_names(read, 3)}, which "
        "statistic(model, micro_batch) has changed on the model: it runs for each micro-batch, and the loss would read "
        "the value of before. Return it from the statistic (a row for each sample, or a sum), or set it before "
        "accumulator.backward(batch).",
        "state",
        "loss",
    )


def _are_same(one: list[Tensor], other: list[Tensor] | None) -> bool:
    if other is None or [part.shape for part in one] != [part.shape for part in other]:
        return False
    # The gradient of an embedding may be sparse.
    pairs = [(mine.to_dense(), theirs.to_dense().to(mine)) for mine, theirs in zip(one, other, strict=True)]
    return all(
        torch.allclose(*pair, rtol=tolerance_of({pair[0].dtype}).statistic, atol=1e-30, equal_nan=True)
        or float((pair[0] - pair[1]).norm()) <= tolerance_of({pair[0].dtype}).statistic * float(pair[0].norm())
        for pair in pairs
    )
