"""Rows: how many a batch has, which is what its tensors agree on in dim 0; and which of them a micro-batch holds.

0-d tensors, numbers, strings and None are the same for every row. A list or tuple within the batch has one entry per
row where it is as long, and does not hold tensors of that many rows. An object without rows is refused by its path:
passed on whole, it would be wrong in silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import torch
from torch import Tensor

from gradfold.batch.nesting import CONSTANTS, Batch, children_of, is_container, is_dataclass, leaves_by_path
from gradfold.batch.own_rows import own_rows
from gradfold.errors import BatchError, EmptyBatchError
from gradfold.messages import join_names

Rows: TypeAlias = Sequence[int]
"""Positions in the global batch; slices of it are rows again."""

COLOR_CHANNELS = (3, 4)  # not 1: that looks like a batch of one row, which is never cut
_SMALLEST_SQUARE = 8  # pixels; smaller ones are as likely sequences


def num_rows(batch: Batch) -> int:
    """The number of rows that all tensors of the batch agree on.

    Tensors inside of a list within the batch need not, where the list has one entry per row.

    Raises:
        BatchError: the tensors disagree, there is none, there are no rows, something cannot be cut by rows, or the
            batch looks like a list of samples.
    """
    return _count(batch, _refuse)


def count_rows(batch: Batch) -> int | None:
    """The rows of a batch that may hold unknown objects beside its tensors; None where they cannot be counted."""
    try:
        return _count(batch, lambda node, path: None)
    except EmptyBatchError:
        return 0
    except BatchError:
        return None


def rows_of_whole(batch: Batch) -> int | None:
    """The rows of a batch that need not be cut, so that the `len()` of an object is enough."""
    if is_container(batch) or isinstance(batch, (Tensor, *CONSTANTS)) or hasattr(batch, "keys"):
        return count_rows(batch)  # the length of an object with keys is their number
    try:
        return len(batch)
    except TypeError:
        return None


def check_counts(batch: Batch, rows: int) -> None:
    """Raise BatchError where a dataclass holds the number of rows, which would be wrong for some of them."""
    for path, node in _dataclasses(batch, "batch"):
        for suffix, value in children_of(node) or []:
            if type(value) is int and value == rows > 1:
                raise BatchError(
                    f"{path}{suffix} is {rows}, the number of rows, and would be passed on to micro-batches that have "
                    f"fewer. Make it a property (return len(...)); if it is another number, bind it to loss_fn with "
                    "functools.partial."
                )


def _dataclasses(node: object, path: str) -> Iterator[tuple[str, object]]:
    if own_rows(node) is not None:
        return
    if is_dataclass(node) and not isinstance(node, Mapping):
        yield path, node
    for suffix, part in children_of(node) or []:
        yield from _dataclasses(part, path + suffix)


Refusal: TypeAlias = Callable[[object, str], None]
"""What is done with an object of an unknown class at a path."""


def _count(batch: Batch, refuse: Refusal) -> int:
    found = list(_counts(batch, "batch", refuse))
    counts = {rows for _, rows, is_listed in found if not is_listed} or {rows for _, rows, _ in found}
    if len(counts) > 1:
        raise _disagreement(batch)
    if not counts:
        raise BatchError(
            f"the batch holds no tensor with rows ({_summary(batch)}); pass a nesting of tensors that agree in dim 0, "
            "or a list of samples with collate=."
        )
    rows = counts.pop()
    if rows == 0:
        raise EmptyBatchError(f"the batch has no rows: {_shapes(batch)}. Skip empty batches before calling backward().")
    if _looks_like_samples(batch, rows) or (all(listed for *_, listed in found) and _are_samples_by_part(batch, rows)):
        raise BatchError(
            f"the batch looks like a list of samples ({_summary(batch)}): its tensors agree in dim 0 ({rows}) only by "
            "accident. Pass collate= (for example torch.utils.data.default_collate) to have samples collated per "
            "micro-batch; if these are different inputs with the same rows, name them in a dict."
        )
    _Check(batch, rows, refuse).visit(batch, "batch")
    return rows


def _counts(node: Batch, path: str, refuse: Refusal, is_listed: bool = False) -> Iterator[tuple[str, int, bool]]:
    """The rows of everything that has some, with its path and whether it is in a list that is in the batch."""
    rows = own_rows(node)
    if rows is None and isinstance(node, Tensor):
        _check_layout(node, path)
        rows = node.shape[0] if node.dim() else None
    if rows is not None:
        yield path, rows, is_listed
        return
    children = children_of(node)
    if children is None:
        if not is_listed and not isinstance(node, (Tensor, *CONSTANTS)):
            refuse(node, path)
        return
    is_listed = is_listed or (path != "batch" and _is_plain(node))
    if is_dataclass(node):
        _check_set(node, path)
    for suffix, part in children:
        yield from _counts(part, path + suffix, refuse, is_listed)


class _Check:
    """Looks at all of a batch of so many rows; raises BatchError where something has not one entry for each."""

    def __init__(self, batch: Batch, rows: int, refuse: Refusal) -> None:
        self._batch = batch
        self._rows = rows
        self._refuse = refuse

    def visit(self, node: Any, path: str) -> None:
        """Look at a part of the batch."""
        rows = own_rows(node)
        if rows is None and isinstance(node, Tensor):
            rows = node.shape[0] if node.dim() else None
        if rows is not None:
            if rows != self._rows:
                raise _disagreement(self._batch)
            return
        if node is not self._batch and has_entry_per_row(node, self._rows):
            self._check_square(node, path)
            return
        children = children_of(node)
        if children is None:
            if not isinstance(node, (Tensor, *CONSTANTS)):
                self._refuse(node, path)
            return
        self._check_values(node, path)
        for suffix, part in children:
            self.visit(part, path + suffix)

    def _check_square(self, node: Any, path: str) -> None:
        if all(_is_plain(part) and len(part) == self._rows and not _has_rows(part) for part in node) and len(node) > 1:
            raise BatchError(
                f"{path} is a {type(node).__name__} of {len(node)} with {len(node)} entries each, and the batch has as "
                "many rows, so it is unclear which of them are rows. Name the columns in a dict."
            )

    def _check_values(self, node: Any, path: str) -> None:
        values = [part for _, part in children_of(node) or [] if part is not None]
        are_values = isinstance(node, (tuple, list)) and values and all(map(_is_value, values))
        if are_values or (_is_plain(node) and not _has_rows(node) and not _is_void(node) and not _holds_lists(node)):
            raise BatchError(
                f"{path} is a {type(node).__name__} of {len(node)} single values, and the batch has {self._rows} rows. "
                "One value per row: let it have as many, make it a tensor, or pass a list of samples with collate=. "
                "The same for all rows: leave it out of the batch and bind it to loss_fn with functools.partial."
            )


def has_entry_per_row(node: object, rows: int) -> bool:
    """Whether a list or tuple within a batch of so many rows has one entry for each, so that it is cut like a tensor.

    Not where it holds columns: tensors that have that many rows themselves.
    """
    if not _is_plain(node) or len(node) != rows or _is_void(node):
        return False
    if type(node) is list and _are_alike(node):
        return True
    return not _has_rows(node) or not all(_is_column(part, rows) for part in node)


def _is_column(node: Any, rows: int) -> bool:
    """Whether a part of a batch has so many rows, or is the same for all."""
    own = own_rows(node)
    if own is not None:
        return own == rows
    if isinstance(node, Tensor):
        return node.dim() == 0 or node.shape[0] == rows
    if isinstance(node, CONSTANTS) or has_entry_per_row(node, rows):
        return True
    children = children_of(node)
    return children is not None and all(_is_column(part, rows) for _, part in children)


def _is_plain(node: object) -> TypeGuard[Sequence[Any]]:
    return type(node) is list or type(node) is tuple


def _has_rows(node: object) -> bool:
    """Whether something in it has rows of its own."""
    if isinstance(node, Tensor):
        return node.dim() > 0
    return own_rows(node) is not None or any(_has_rows(part) for _, part in children_of(node) or [])


def _is_void(node: object) -> bool:
    """Whether it is None, or holds nothing else."""
    children = children_of(node)
    return node is None if children is None else all(_is_void(part) for _, part in children)


def _holds_lists(node: Sequence[Any]) -> bool:
    return all(part is None or _is_plain(part) for part in node)


def _is_value(node: object) -> bool:
    return isinstance(node, (bool, int, float, complex, str, bytes)) or (isinstance(node, Tensor) and node.dim() == 0)


def _check_set(node: Any, path: str) -> None:
    for field in dataclasses.fields(node):
        if not hasattr(node, field.name):
            raise BatchError(f"{path}.{field.name} has no value yet; set every field of {type(node).__name__}.")


def _check_layout(node: Tensor, path: str) -> None:
    if node.is_nested or node.layout not in (torch.strided, torch.sparse_coo):
        kind = "nested tensor" if node.is_nested else f"{node.layout} tensor"
        raise BatchError(f"{path} is a {kind}, whose rows cannot be sliced: pass a list of samples with collate=.")


def _refuse(node: object, path: str) -> None:
    name = f"{type(node).__module__}.{type(node).__qualname__}"
    if name.startswith("numpy."):
        raise BatchError(f"{path} is a {name}, expected a tensor: write torch.as_tensor(...) for it.")
    raise BatchError(
        f"{path} is a {name}, which gradfold cannot split by rows. Pass tensors in tuples, lists, dicts or "
        "dataclasses, or a list of samples with collate=, and build this object there. A class with slices of its own "
        "kind (__getitem__, __len__ and to) is split by these."
    )


def _disagreement(batch: Batch) -> BatchError:
    hint = "Every tensor needs one entry per row in dim 0, and a list of anything else one entry per row."
    if isinstance(batch, tuple | list):
        hint += " If this is a list of samples, pass collate= (for example torch.utils.data.default_collate)."
    return BatchError(f"the tensors of the batch disagree in dim 0, the rows: {_shapes(batch)}. {hint}")


def _looks_like_samples(batch: Batch, rows: int, is_root: bool = True) -> bool:
    """Whether tensors that agree in dim 0 are more likely one sample each than columns of a batch.

    A list of tuples, dicts or dataclasses of one kind is what `collate_fn=list` gives (torch's own collation turns
    tuples into lists). A sequence of C x H x W tensors longer than C, or of sizes as pictures have them, agrees on its
    channels.
    """
    if isinstance(batch, (tuple, list)) and batch:
        if all(isinstance(part, Tensor) for part in batch):
            return len(batch) > 1 and _are_pictures(batch)
        is_entry_list = not is_root and len(batch) == rows
        if isinstance(batch, list) and not is_entry_list and _are_alike(batch) and _has_rows(batch):
            return True
    if own_rows(batch) is not None or (not is_root and has_entry_per_row(batch, rows)):
        return False
    parts = [part for _, part in children_of(batch) or [] if not isinstance(part, Tensor)]
    return any(_looks_like_samples(part, rows, False) for part in parts)


def _are_pictures(tensors: Sequence[Tensor]) -> bool:
    """C x H x W: more of them than channels, of other heights and widths, or squares."""
    if any(one.dim() != 3 or one.is_nested for one in tensors) or len(tensors[0]) not in COLOR_CHANNELS:
        return False
    (_, height, width) = tensors[0].shape
    differ = any(one.shape[1] != height and one.shape[2] != width for one in tensors)
    are_squares = all(one.shape[1] == one.shape[2] >= _SMALLEST_SQUARE for one in tensors)
    return len(tensors) > len(tensors[0]) or differ or are_squares


def _are_alike(parts: Sequence[Any]) -> bool:
    """Whether all are tuples, dicts, dataclasses or objects with rows of one kind."""
    if not all(isinstance(part, (tuple, Mapping)) or is_dataclass(part) or _is_object(part) for part in parts):
        return False
    return len({(type(part), *[suffix for suffix, _ in children_of(part) or []]) for part in parts}) == 1


def _is_object(node: object) -> bool:
    return not isinstance(node, Tensor) and own_rows(node) is not None


def _are_samples_by_part(batch: Batch, rows: int) -> bool:
    """Whether lists hold a tensor, and something else, for each of as many samples: images and labels, say."""
    lists = [part for _, part in children_of(batch) or [] if _is_plain(part) and len(part) == rows]
    having = [all(isinstance(part, Tensor) and part.dim() for part in one) for one in lists]
    return any(having) and any(not _has_rows(one) and not _is_void(one) for one in lists)


def holds_samples(batch: Batch, samples: Sequence[Any]) -> bool:
    """Whether what was collated holds the samples themselves, or a list with an entry for each."""
    if not isinstance(batch, (tuple, list)):
        return any(_is_plain(part) and len(part) == len(samples) for _, part in children_of(batch) or [])
    if len(batch) == len(samples) and (
        all(one is sample for one, sample in zip(batch, samples, strict=True)) or _are_pictures_only(batch)
    ):
        return True
    return any(_is_plain(part) and len(part) == len(samples) for part in batch)


def _are_pictures_only(batch: Sequence[Any]) -> bool:
    return all(isinstance(part, Tensor) for part in batch) and _are_pictures(batch)


def _shapes(batch: Batch) -> str:
    return join_names([f"batch{path} {tuple(leaf.shape)}" for path, leaf in _tensors(batch)])


def _tensors(batch: Batch) -> list[tuple[str, Any]]:
    return [(path, leaf) for path, leaf in leaves_by_path(batch) if isinstance(leaf, Tensor)]


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
