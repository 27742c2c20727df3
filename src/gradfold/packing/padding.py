"""A trimming: rows of a batch of padded tensors, without the padding that these rows do not need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gradfold.batch.cutting import take_rows
from gradfold.batch.nesting import Batch, leaves_by_path, map_tensors
from gradfold.batch.rows import Rows
from gradfold.errors import BatchError

Named: TypeAlias = Mapping[str, Mapping[str | int, tuple[int, ...] | None]]
"""For each input what the user says of its tensors: their dimensions, None where those are to be found."""


class PaddedBatch:
    """Tensors that agree in dim 0, of which some go with the tokens.

    A tensor does where one of its dimensions has the padded length and holds, beyond each row's length, the same
    everywhere: padding. That is looked at in every batch. A tensor of that size which holds something else is refused
    unless it is named, since its columns may be tokens or not.

    Attributes:
        widths: for each input, what every row needs by itself: its length and, on the left, the column before it.
        padded: for each input, the padded length of the batch.
        paths: of the tensors that are trimmed, with their dimensions.
        found: of which input each dimension is that was found to go with the tokens, and was not named.

    Raises:
        BatchError: it cannot be known what goes with the tokens.
    """

    def __init__(
        self, batch: Batch, lengths: Mapping[str, Tensor], side: Literal["right", "left"], named: Named
    ) -> None:
        self._batch = batch
        self._side = side
        self._lengths = lengths
        leaves = leaves_by_path(batch)
        self._leaves = {path: leaf for path, leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 1}
        self._dims: dict[int, dict[int, str]] = {}  # by tensor, of which input each dimension is that is trimmed
        self.padded: dict[str, int] = {}
        self.paths: dict[str, tuple[int, ...]] = {}
        self.found: dict[str, str] = {}
        self._find(self._take_named(named))
        self.widths = {
            name: (length + (side == "left")).clamp(min=1, max=max(1, self.padded[name]))
            for name, length in lengths.items()
        }

    def of_rows(self, rows: Rows) -> Batch:
        """These rows, no longer than the longest of them; copied, since a narrower view could not be viewed again."""
        return self._select(rows, {name: int(width[torch.tensor(rows)].max()) for name, width in self.widths.items()})

    def untrimmed(self, rows: Rows) -> Batch:
        """These rows with all of their padding."""
        return self._select(rows, self.padded)

    def _select(self, rows: Rows, widths: Mapping[str, int]) -> Batch:
        @cache  # what a batch holds twice, its parts hold twice
        def trim(leaf: Tensor) -> Tensor:
            for dim, name in self._dims.get(id(leaf), {}).items():
                size, width = leaf.shape[dim], min(widths[name], leaf.shape[dim])
                leaf = leaf.narrow(dim, size - width if self._side == "left" else 0, width)
            return leaf

        return take_rows(map_tensors(trim, self._batch), rows)

    @property
    def full_width(self) -> int:
        """The padded length of the batch, all inputs together."""
        return sum(self.padded.values())

    def _take_named(self, named: Named) -> set[int]:
        """Note what the user says; returns the ids of the tensors of which nothing is to be found out."""
        kept: set[int] = set()
        for name, lengths in self._lengths.items():
            asked = {path: dims for leaf, dims in named.get(name, {}).items() for path in self._paths_of(leaf)}
            for path, dims in asked.items():
                self._trim(path, self._dims_of_named(path, asked, int(lengths.max())) if dims is None else dims, name)
                kept.add(id(self._leaves[path]))
        return kept

    def _paths_of(self, leaf: str | int) -> list[str]:
        """The tensors that are called that: by the whole path, or by the key, attribute or index."""
        found = [path for path in self._leaves if path == leaf or path.endswith((f"[{leaf!r}]", f".{leaf}"))]
        if not found:
            raise BatchError(
                f"trim= names {leaf!r}, and the batch has no such tensor of two dimensions; it has "
                f"{', '.join(f'batch{path}' for path in self._leaves)}."
            )
        return found

    def _dims_of_named(self, path: str, asked: Collection[str], longest: int) -> list[int]:
        """Those of the length that a tensor shares with the others; its own only long dimension where it is alone."""
        shape = self._leaves[path].shape
        own = {size for size in shape[1:] if size >= longest}
        shared = {
            size for other, leaf in self._leaves.items() if other not in asked for size in own & {*leaf.shape[1:]}
        }
        sizes = shared or own
        if len(sizes) != 1:
            raise BatchError(
                f"trim= names batch{path} {tuple(shape)}, and it is unclear which of its dimensions has the padded "
                f"length, with rows of up to {longest} tokens. Pass them: trim={{...: (1,)}}."
            )
        return [dim for dim in range(1, len(shape)) if shape[dim] in sizes]

    def _find(self, kept: set[int]) -> None:
        """Find the tensors that go with the tokens, and refuse those of which it cannot be known."""
        leaves, lengths = self._leaves, self._lengths
        places = [(path, dim) for path, leaf in leaves.items() if id(leaf) not in kept for dim in range(1, leaf.dim())]
        tightest = sorted(lengths, key=lambda name: int(lengths[name].sum()))  # the input with the shortest rows first
        fitting: dict[tuple[str, int], str | None] = {}  # None: long enough, and not padded
        for path, dim in places:
            leaf = leaves[path]
            names = [name for name in tightest if leaf.shape[dim] >= max(2, int(lengths[name].max()))]
            if names:
                fits = (name for name in names if _is_padding(leaf, dim, lengths[name], self._side))
                fitting[path, dim] = next(fits, None)
        for name in lengths:
            self._settle_size(name, {leaves[path].shape[dim] for (path, dim), fit in fitting.items() if fit == name})
        for (path, dim), fit in fitting.items():
            size = leaves[path].shape[dim]
            if fit is None and size in self.padded.values():
                name = path.strip("[].").split("[")[-1].strip("'\"") or "..."
                raise BatchError(
                    f"batch{path} {tuple(leaves[path].shape)} has the padded length in dim {dim}, and holds something "
                    "else than padding beyond the rows' lengths, so it is unclear whether it goes with the tokens. If "
                    f'it does, name it: trim=("{name}",). If not: trim={{"{name}": ()}}.'
                )
            # One column beyond every row is the same everywhere in it, whatever it holds: that says nothing.
            if fit is not None and size == self.padded[fit] and size - int(lengths[fit].min()) > 1:
                self._trim(path, (dim,), fit)
                self.found[f"{path} dim {dim}"] = fit

    def _settle_size(self, name: str, sizes: set[int]) -> None:
        """Note the padded length of an input, given the sizes of what fits; raises BatchError unless it is one."""
        lengths = self._lengths[name]
        longest = int(lengths.max())
        sizes = sizes | ({self.padded[name]} if self.padded.get(name) else set())
        if len(sizes) > 1 and bool((lengths == longest).all()):
            sizes = {size for size in sizes if size > longest}  # that there is nothing beyond them says little
        if not sizes and longest < 2:
            sizes = {longest}  # nothing to trim
        of = f" of {name!r}" if name else ""
        shapes = ", ".join(f"batch{path} {tuple(leaf.shape)}" for path, leaf in self._leaves.items()) or "none"
        if len(sizes) > 1:
            raise BatchError(
                f"dimensions of {' and '.join(map(str, sorted(sizes)))} could each be the padded length{of}, with rows "
                f"of up to {longest} tokens: {shapes}. Name what goes with the tokens, with its dimensions, "
                'and () for what does not: trim={"input_ids": 1, "features": ()}.'
            )
        if not sizes:
            raise BatchError(
                f"no tensor of the batch goes with the tokens{of}: none has a dimension of at least the longest "
                f"length, {longest}, that holds the same everywhere beyond each row's length. The tensors are "
                f"{shapes}. Check lengths= and padding_side=, or name them: trim=(...)."
            )
        self.padded[name] = sizes.pop()

    def _trim(self, path: str, dims: Sequence[int], name: str) -> None:
        leaf = self._leaves[path]
        for dim in (dim + leaf.dim() if dim < 0 else dim for dim in dims):
            if not 0 < dim < leaf.dim():
                raise BatchError(
                    f"trim= names the dimensions {tuple(dims)} of batch{path} {tuple(leaf.shape)}; expected such from "
                    f"1 to {leaf.dim() - 1}, since dim 0 counts the rows."
                )
            size = self.padded.setdefault(name, leaf.shape[dim])
            if size != leaf.shape[dim]:
                raise BatchError(
                    f"batch{path} {tuple(leaf.shape)} is to be trimmed in dim {dim}, which has another size than the "
                    f"padded length {size}."
                )
            self._dims.setdefault(id(leaf), {})[dim] = name
            self.paths[path] = (*self.paths.get(path, ()), dim)


def _is_padding(leaf: Tensor, dim: int, lengths: Tensor, side: Literal["right", "left"]) -> bool:
    """Whether a tensor holds, beyond the length of each row, the same everywhere in that row."""
    if leaf.layout is not torch.strided or leaf.is_nested:
        return False
    columns = leaf.detach().movedim(dim, 1)
    padding = columns[:, -1:] if side == "right" else columns[:, :1]
    is_token = tokens(leaf.shape[dim], lengths.to(leaf.device), side)
    is_token = is_token.view(*is_token.shape, *[1] * (columns.dim() - 2))
    return bool(((columns == padding) | is_token).all())


def tokens(size: int, lengths: Tensor, side: str) -> Tensor:
    """Where rows of these lengths have tokens, (rows, size)."""
    places, ends = torch.arange(size, device=lengths.device), lengths[:, None]
    return places < ends if side == "right" else places >= size - ends
