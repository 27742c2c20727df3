"""Padded rows: some rows of a batch by which it shows whether a model lets padding through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold.length_plan import width_of
from gradfold.rows import Rows
from gradfold.split import Collate, MicroBatch
from gradfold.trimming import Trimming

__all__: list[str] = []

_MOST_PADDED_ROWS = 8  # that are run with more padding than they need


class PaddedRows(NamedTuple):
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
    trimming: Trimming, lengths: Mapping[str, Tensor], groups: Sequence[Rows], max_tokens: int, look: int
) -> Callable[[], PaddedRows] | None:
    """Some rows that need half of the padded length at most, as many as fit with all of it."""
    group = _half_as_long(groups, trimming.widths, trimming.padded, look)
    if group is None:
        return None
    rows = group[: max(1, min(_MOST_PADDED_ROWS, max_tokens // trimming.full_width))]

    def make() -> PaddedRows:
        whole = MicroBatch(trimming.untrimmed(rows), range(len(rows)))
        part = MicroBatch(trimming.of_rows(rows), range(len(rows)))
        return PaddedRows(whole, (part,), {name: length[torch.tensor(rows)] for name, length in lengths.items()})

    return make


def find_in_samples(
    samples: Sequence[Any], collate: Collate, widths: Mapping[str, Tensor], groups: Sequence[Rows], look: int
) -> Callable[[], PaddedRows] | None:
    """Some samples together with the longest, of which they are half as long at most, beside both by themselves."""
    longest = int(torch.stack(list(widths.values())).sum(0).argmax())
    group = _half_as_long(groups, widths, {name: int(width[longest]) for name, width in widths.items()}, look)
    if group is None or longest in group:
        return None
    rows = group[:_MOST_PADDED_ROWS]

    def make() -> PaddedRows:
        short, long = [samples[row] for row in rows], [samples[longest]]
        num = len(short)
        return PaddedRows(
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
