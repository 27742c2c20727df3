"""Rows: how many a batch has, which is what its tensors agree on in dim 0; and which of them a micro-batch holds.

An object without rows is refused by its path: passed on whole, it would be wrong in silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradfold.batch.nesting import CONSTANTS, Batch, children_of, is_dataclass
from gradfold.errors import BatchError, EmptyBatchError
from gradfold.messages import join_names

Rows: TypeAlias = Sequence[int]
"""Positions in the global batch; slices of it are rows again."""

_COLOR_CHANNELS = (3, 4)  # not 1: that looks like a batch of one row, which is never cut


def num_rows(batch: Batch) -> int:
    """The number of rows that all tensors of the batch agree on.

    Raises:
        BatchError: the tensors disagree, there is none, there are no rows, something cannot be cut by rows, or the
            batch looks like a list of samples.
    """
    counts = {leaf.shape[0] for _, leaf in _leaves(batch, "batch") if isinstance(leaf, Tensor) and leaf.dim() > 0}
    if len(counts) > 1:
        hint = "Every tensor needs one entry per row in dim 0."
        if isinstance(batch, tuple | list):
            hint += " If this is a list of samples, pass collate= (for example torch.utils.data.default_collate)."
        raise BatchError(f"the tensors of the batch disagree in dim 0, the rows: {_shapes(batch)}. {hint}")
    if not counts:
        raise BatchError(
            f"the batch holds no tensor with rows ({_summary(batch)}); pass a nesting of tensors that agree in dim 0, "
            "or a list of samples with collate=."
        )
    rows = counts.pop()
    if rows == 0:
        raise EmptyBatchError(f"the batch has no rows: {_shapes(batch)}. Skip empty batches before calling backward().")
    if _looks_like_samples(batch):
        raise BatchError(
            f"the batch looks like a list of samples ({_summary(batch)}): its tensors agree in dim 0 ({rows}) only by "
            "accident. Pass collate= (for example torch.utils.data.default_collate) to have samples collated per "
            "micro-batch; if these are different inputs with the same rows, name them in a dict."
        )
    return rows


def _leaves(node: Batch, path: str) -> Iterator[tuple[str, Any]]:
    """Everything that is not a container, with the path that leads to it; raises BatchError where it has no rows."""
    children = children_of(node)
    if children is None:
        _check_leaf(node, path)
        yield path, node
        return
    if is_dataclass(node):
        for field in dataclasses.fields(node):
            if not hasattr(node, field.name):
                raise BatchError(f"{path}.{field.name} has no value yet; set every field of {type(node).__name__}.")
    values = [part for _, part in children if part is not None]
    if isinstance(node, (tuple, list)) and values and all(map(_is_value, values)):
        raise BatchError(
            f"{path} is a {type(node).__name__} of {len(node)} single values: gradfold cannot know whether "
            "it has one value per row. Per row: make it a tensor, or pass a list of samples with collate=. The same "
            "for all rows: leave it out of the batch and bind it to loss_fn with functools.partial."
        )
    for suffix, part in children:
        yield from _leaves(part, path + suffix)


def _is_value(node: object) -> bool:
    return isinstance(node, (bool, int, float, complex, str, bytes)) or (isinstance(node, Tensor) and node.dim() == 0)


def _check_leaf(node: object, path: str) -> None:
    if isinstance(node, Tensor):
        if node.is_nested or node.layout not in (torch.strided, torch.sparse_coo):
            kind = "nested tensor" if node.is_nested else f"{node.layout} tensor"
            raise BatchError(f"{path} is a {kind}, whose rows cannot be sliced: pass a list of samples with collate=.")
    elif not isinstance(node, CONSTANTS):
        name = f"{type(node).__module__}.{type(node).__qualname__}"
        if name.startswith("numpy."):
            raise BatchError(f"{path} is a {name}, expected a tensor: write torch.as_tensor(...) for it.")
        raise BatchError(
            f"{path} is a {name}, which gradfold cannot split by rows. Pass tensors in tuples, lists, dicts or "
            "dataclasses, or a list of samples with collate=, and build this object there."
        )


def _looks_like_samples(batch: Batch) -> bool:
    """Whether tensors that agree in dim 0 are more likely one sample each than columns of a batch.

    A list of tuples, dicts or dataclasses of one kind is what `collate_fn=list` gives (torch's own collation turns
    tuples into lists). A sequence of C x H x W tensors longer than C agrees on its channels.
    """
    if isinstance(batch, (tuple, list)) and batch:
        if all(isinstance(part, Tensor) for part in batch):
            are_images = all(part.dim() == 3 for part in batch)
            return are_images and len(batch[0]) in _COLOR_CHANNELS and len(batch) > len(batch[0])
        if isinstance(batch, list) and all(isinstance(part, (tuple, Mapping)) or is_dataclass(part) for part in batch):
            return len({tuple(suffix for suffix, _ in children_of(part) or []) for part in batch}) == 1
    return any(_looks_like_samples(part) for _, part in children_of(batch) or [] if not isinstance(part, Tensor))


def _shapes(batch: Batch) -> str:
    return join_names(
        [f"{path} {tuple(leaf.shape)}" for path, leaf in _leaves(batch, "batch") if isinstance(leaf, Tensor)]
    )


def _summary(batch: Batch) -> str:
    children = children_of(batch)
    if children is None:
        return f"a {type(batch).__name__}"
    kinds = sorted({type(part).__name__ for _, part in children})
    return f"a {type(batch).__name__} of {len(children)} {'/'.join(kinds) or 'elements'}"


def name_rows(rows: Rows) -> str:
    """The rows, for a message.

    >>> name_rows(range(4, 8)), name_rows(range(7, 8)), name_rows((7, 0, 3)), name_rows(tuple(range(0, 20, 2)))
    ('rows 4 to 7', 'row 7', 'rows 7, 0 and 3', 'rows 0, 2, 4, 6 and 6 more')
    """
    if isinstance(rows, range) and rows.step == 1 and len(rows) > 1:
        return f"rows {rows.start} to {rows.stop - 1}"
    return f"{'row' if len(rows) == 1 else 'rows'} {join_names(list(map(str, rows)), limit=4)}"


def shift_rows(rows: Rows, by: int) -> Rows:
    """The same rows in a batch that has `by` others before them."""
    if isinstance(rows, range):
        return range(rows.start + by, rows.stop + by, rows.step)
    return tuple(row + by for row in rows)
