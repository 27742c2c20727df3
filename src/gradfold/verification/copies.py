"""Copies of a user's model and batch in another precision."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence

from gradfold.batch import Batch, map_leaves
from gradfold.errors import ModelError
from gradfold.gradients import check_trainable

__all__: list[str] = []


def own_dtypes(model: nn.Module) -> set[torch.dtype]:
    """The floating point dtypes of a model's parameters."""
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def copy_of(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a model, in another precision if there is one given.

    Raises:
        ModelError: it has nothing to train, has lazy layers, or cannot be copied.
    """
    check_trainable(model, list(model.parameters()))
    if any(map(is_lazy, model.parameters())):
        raise ModelError("the model has lazy layers that have not run yet: run one forward pass, then verify.")
    # Results of an earlier forward pass (weight_norm keeps one) refuse to be copied as they are.
    results = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in results if not value.is_leaf}
    try:
        other = copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and a proof runs on a copy. "
            "Let copy.deepcopy(model) work: look for locks, files, generators and tensors with a graph in attributes."
        ) from error
    if dtype is not None:  # not .to(dtype), which makes complex parameters real
        other._apply(lambda tensor: _in_dtype(tensor, dtype))  # type: ignore[no-untyped-call]
    return other


def batch_in(dtype: torch.dtype, batch: Batch) -> Batch:
    """A batch whose real numbers have this precision; complex ones, twice of it."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return _in_dtype(leaf, dtype)
        return leaf.to(dtype) if isinstance(leaf, PackedSequence) and leaf.data.is_floating_point() else leaf

    return map_leaves(convert, batch)


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor.to(dtype.to_complex()) if tensor.is_complex() else tensor
