"""A trimming: rows of a batch of padded tensors, without the padding that these rows do not need.

A tensor goes with the tokens where one of its dimensions has the padded length and holds, beyond each row's length,
the same everywhere: padding. That is looked at in every batch. A tensor of that size which holds something else is
refused unless it is named, since nobody can tell whether its columns are tokens.

Padded rows: some rows of a batch by which it shows whether a model lets padding through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch, leaves_by_path, map_tensors
from gradfold.batch.rows import Rows
from gradfold.batch.split import Collate, MicroBatch
from gradfold.errors import BatchError
from gradfold.packing.packer import width_of

__all__: list[str] = []

Named: TypeAlias = Callable[[str], "Mapping[str | int, tuple[int, ...] | None]"]
"""From the name of an input to what the user says of its tensors: their dimensions, None where those are to be found.
"""


class PaddedBatch:
    """What to cut off a batch.

    Args:
        batch: tensors that agree in dim 0.
        lengths: for each input the length of every row.
        side: where the padding is.
        named: what the user says of tensors.

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
        leaves = {path: leaf for path, leaf in leaves_by_path(batch) if isinstance(leaf, Tensor) and leaf.dim() > 1}
        self._dims: dict[int, dict[int, str]] = {}  # by tensor, of which input each dimension is that is trimmed
        self.padded: dict[str, int] = {}
        self.paths: dict[str, tuple[int, ...]] = {}
        self.found: dict[str, str] = {}
        kept = self._take_named(leaves, lengths, named)
        self._find(leaves, lengths, kept)
        self.widths = {
            name: (length + (side == "left")).clamp(min=1, max=max(1, self.padded[name]))
            for name, length in lengths.items()
        }

    def of_rows(self, rows: Rows) -> Batch:
        """These rows, no longer than the longest of them; copied, since a narrower view could not be viewed again."""
        index = torch.tensor(rows)
        widths = {name: int(width[index].max()) for name, width in self.widths.items()}
        done: dict[int, Tensor] = {}

        def cut(leaf: Tensor) -> Tensor:
            if leaf.dim() and id(leaf) not in done:
                done[id(leaf)] = self._narrowed(leaf, widths).index_select(0, index.to(leaf.device))
            return done.get(id(leaf), leaf)

        return map_tensors(cut, self._batch)

    def untrimmed(self, rows: Rows) -> Batch:
        """These rows with all of their padding."""
        index = torch.tensor(rows)
        return map_tensors(
            lambda leaf: leaf.index_select(0, index.to(leaf.device)) if leaf.dim() else leaf, self._batch
        )

    def width(self, rows: Rows) -> int:
        """The padded length of these rows, all inputs together."""
        return width_of(self.widths, rows)

    @property
    def full_width(self) -> int:
        """The padded length of the batch, all inputs together."""
        return sum(self.padded.values())

    def _narrowed(self, leaf: Tensor, widths: Mapping[str, int]) -> Tensor:
        for dim, name in self._dims.get(id(leaf), {}).items():
            size, width = leaf.shape[dim], min(widths[name], leaf.shape[dim])
            leaf = leaf.narrow(dim, size - width if self._side == "left" else 0, width)
        return leaf

    def _take_named(self, leaves: Mapping[str, Tensor], lengths: Mapping[str, Tensor], named: Named) -> set[int]:
        """Note what the user says; gives the tensors of which nothing is to be found out."""
        kept: set[int] = set()
        for name, length in lengths.items():
            longest = int(length.max())
            asked = dict(named(name))
            found = {leaf: [path for path in leaves if _is_named(path, leaf)] for leaf in asked}
            missing = [leaf for leaf, paths in found.items() if not paths]
            if missing:
                raise BatchError(
                    f"trim= names {', '.join(map(repr, missing))}, and the batch has no such tensor of two dimensions; "
                    f"it has {', '.join(f'batch{path}' for path in leaves)}."
                )
            for leaf, paths in found.items():
                for path in paths:
                    tensor = leaves[path]
                    dims = asked[leaf]
                    if dims is None:
                        dims = tuple(_dims_of_size(tensor, self._size_of_named(leaves, found, longest, path)))
                    self._trim(path, tensor, _positive(tensor, dims, path), name)
                    kept.add(id(tensor))
        return kept

    def _size_of_named(
        self, leaves: Mapping[str, Tensor], found: Mapping[Any, Sequence[str]], longest: int, path: str
    ) -> int:
        """The padded length that a tensor shares with the others; its own only long dimension where it is alone."""
        own = {size for size in leaves[path].shape[1:] if size >= longest}
        all_named = {one for paths in found.values() for one in paths}
        others = [leaf for other, leaf in leaves.items() if other not in all_named]
        shared = {size for size in own if any(size in leaf.shape[1:] for leaf in others)}
        sizes = shared or own
        if len(sizes) != 1:
            raise BatchError(
                f"trim= names batch{path} {tuple(leaves[path].shape)}, and it is unclear which of its dimensions has "
                f"the padded length, with rows of up to {longest} tokens. Give them: trim={{...: (1,)}}."
            )
        return sizes.pop()

    def _find(self, leaves: Mapping[str, Tensor], lengths: Mapping[str, Tensor], kept: set[int]) -> None:
        """Find the tensors that go with the tokens, and refuse those of which it cannot be known."""
        places = [(path, dim) for path, leaf in leaves.items() if id(leaf) not in kept for dim in range(1, leaf.dim())]
        fitting: dict[tuple[str, int], str] = {}
        unclear: list[tuple[str, int]] = []
        for path, dim in places:
            names = _long_enough(leaves[path].shape[dim], lengths)
            fits = next((name for name in names if _is_padding(leaves[path], dim, lengths[name], self._side)), None)
            if fits is not None:
                fitting[path, dim] = fits
            elif names:
                unclear.append((path, dim))
        for name in lengths:
            sizes = {leaves[path].shape[dim] for (path, dim), fits in fitting.items() if fits == name}
            self._settle_size(name, sizes, lengths[name], leaves)
        for path, dim in unclear:
            if leaves[path].shape[dim] in self.padded.values():
                raise self._is_unclear(path, dim, leaves[path])
        for (path, dim), name in fitting.items():
            # One column beyond every row is the same everywhere in it, whatever it holds: that says nothing.
            is_evident = self.padded[name] - int(lengths[name].min()) > 1
            if leaves[path].shape[dim] == self.padded[name] and is_evident:
                self._trim(path, leaves[path], (dim,), name)
                self.found[f"{path} dim {dim}"] = name

    def _settle_size(self, name: str, sizes: set[int], lengths: Tensor, leaves: Mapping[str, Tensor]) -> None:
        known, longest = self.padded.get(name), int(lengths.max())
        sizes = sizes | ({known} if known else set())
        if len(sizes) > 1 and bool((lengths == longest).all()):
            sizes = {size for size in sizes if size > longest}  # that there is nothing beyond them says little
        if not sizes and longest < 2:
            sizes = {longest}  # nothing to trim
        of = f" of {name!r}" if name else ""
        shapes = ", ".join(f"batch{path} {tuple(leaf.shape)}" for path, leaf in leaves.items()) or "none"
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

    def _is_unclear(self, path: str, dim: int, leaf: Tensor) -> BatchError:
        name = path.strip("[].").split("[")[-1].strip("'\"") or "..."
        return BatchError(
            f"batch{path} {tuple(leaf.shape)} has the padded length in dim {dim}, and holds something else than "
            "padding beyond the rows' lengths, so that it is unclear whether it goes with the tokens. If it does, name "
            f'it: trim=("{name}",). If not: trim={{"{name}": ()}}.'
        )

    def _trim(self, path: str, leaf: Tensor, dims: Sequence[int], name: str) -> None:
        for dim in dims:
            size = self.padded.setdefault(name, leaf.shape[dim])
            if size != leaf.shape[dim]:
                raise BatchError(
                    f"batch{path} {tuple(leaf.shape)} is to be trimmed in dim {dim}, which has another size than the "
                    f"padded length {size}."
                )
            self._dims.setdefault(id(leaf), {})[dim] = name
            self.paths[path] = (*self.paths.get(path, ()), dim)


def _long_enough(size: int, lengths: Mapping[str, Tensor]) -> list[str]:
    """The inputs that could have this padded length; that with the shortest rows, which fits tightest, first."""
    return [
        name
        for name in sorted(lengths, key=lambda name: int(lengths[name].sum()))
        if size >= max(2, int(lengths[name].max()))
    ]


def _is_padding(leaf: Tensor, dim: int, lengths: Tensor, side: Literal["right", "left"]) -> bool:
    """Whether a tensor holds, beyond the length of each row, the same everywhere in that row."""
    if leaf.layout is not torch.strided or leaf.is_nested:
        return False
    size = leaf.shape[dim]
    columns = leaf.detach().movedim(dim, 1)
    places = torch.arange(size, device=leaf.device)
    lengths = lengths.to(leaf.device)[:, None]
    is_token = places < lengths if side == "right" else places >= size - lengths
    padding = columns[:, -1:] if side == "right" else columns[:, :1]
    is_token = is_token.view(*is_token.shape, *[1] * (columns.dim() - 2))
    return bool(((columns == padding) | is_token).all())


def _is_named(path: str, name: str | int) -> bool:
    """Whether a tensor is called that: by its whole path, or by its key, attribute or index."""
    return path == name or path.endswith(f"[{name!r}]") or path.endswith(f".{name}")


def _dims_of_size(leaf: Tensor, size: int) -> list[int]:
    return [dim for dim in range(1, leaf.dim()) if leaf.shape[dim] == size]


def _positive(leaf: Tensor, dims: Sequence[int], path: str) -> tuple[int, ...]:
    found = tuple(dim + leaf.dim() if dim < 0 else dim for dim in dims)
    if any(not 0 < dim < leaf.dim() for dim in found):
        raise BatchError(
            f"trim= names the dimensions {tuple(dims)} of batch{path} {tuple(leaf.shape)}; expected such from 1 to "
            f"{leaf.dim() - 1}, since dim 0 counts the rows."
        )
    return found


_MOST_PADDED_ROWS = 8  # that are run with more padding than they need


class PaddingProbe(NamedTuple):
    """Some rows of a batch with more padding than they need, and the same rows as they are run.

    Attributes:
        whole: with padding to the length of the batch, or of its longest row.
        parts: padded to their own length; together the same rows in the same order.
        lengths: for each input the length of every row of the first part.
    """

    whole: MicroBatch
    parts: tuple[MicroBatch, ...]
    lengths: Mapping[str, Tensor]


def find_in_tensors(
    trimming: PaddedBatch, lengths: Mapping[str, Tensor], groups: Sequence[Rows], max_tokens: int, look: int
) -> Callable[[], PaddingProbe] | None:
    """Some rows that need half of the padded length at most, as many as fit with all of it."""
    group = _half_as_long(groups, trimming.widths, trimming.padded, look)
    if group is None:
        return None
    rows = group[: max(1, min(_MOST_PADDED_ROWS, max_tokens // trimming.full_width))]

    def make() -> PaddingProbe:
        whole = MicroBatch(trimming.untrimmed(rows), range(len(rows)))
        part = MicroBatch(trimming.of_rows(rows), range(len(rows)))
        return PaddingProbe(whole, (part,), {name: length[torch.tensor(rows)] for name, length in lengths.items()})

    return make


def find_in_samples(
    samples: Sequence[Any], collate: Collate, widths: Mapping[str, Tensor], groups: Sequence[Rows], look: int
) -> Callable[[], PaddingProbe] | None:
    """Some samples together with the longest, of which they are half as long at most, beside both by themselves."""
    longest = int(torch.stack(list(widths.values())).sum(0).argmax())
    group = _half_as_long(groups, widths, {name: int(width[longest]) for name, width in widths.items()}, look)
    if group is None or longest in group:
        return None
    rows = group[:_MOST_PADDED_ROWS]

    def make() -> PaddingProbe:
        short, long = [samples[row] for row in rows], [samples[longest]]
        num = len(short)
        return PaddingProbe(
            MicroBatch(collate(short + long), range(num + 1)),
            (MicroBatch(collate(short), range(num)), MicroBatch(collate(long), range(num, num + 1))),
            {name: width[torch.tensor(rows)] for name, width in widths.items()},
        )

    return make


def _half_as_long(
    groups: Sequence[Rows], widths: Mapping[str, Tensor], padded: Mapping[str, int], look: int
) -> Rows | None:
    """The longest rows that are half as long at most, which have tokens and are much padded; else the shortest.

    Of several inputs all are shorter, if there are such rows. At the next look others, since these may weigh nothing.
    """
    total = sum(padded.values())
    shorter = [rows for rows in groups if width_of(widths, rows) < total]
    half = [rows for rows in shorter if 2 * width_of(widths, rows) <= total]
    in_all = [
        rows
        for rows in half or shorter
        if all(int(width[torch.tensor(rows)].max()) < padded[name] for name, width in widths.items())
    ]
    found = in_all or half or shorter[-1:]
    return found[look % len(found)] if found else None
