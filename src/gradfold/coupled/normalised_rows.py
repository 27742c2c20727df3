"""Normalised rows: whether a BatchNorm normalises rows of the batch, and nothing that each micro-batch brings anew.

The statistics of a window are those of the whole batch where the values that micro-batches bring add up to those that
the batch would bring. Prototypes do not: every micro-batch brings them, the batch once. Nor does padding, where the
micro-batch decides how much there is of it. How many values a call gets tells them apart:

    rows          as many for a micro-batch as for its two parts together
    one thing     as many for each part as for the whole; it is counted once, and must be the same everywhere
    a mixture     anything else: refused, since the statistics would be others
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from gradfold.batch import Batch, rows_if_any, structure
from gradfold.coupled.attendance import UNNAMED
from gradfold.coupled.interception import BatchNormCall, by_fixed_statistics
from gradfold.coupled.moments import Moments
from gradfold.coupled.tried_runs import TriedRuns
from gradfold.errors import BatchNormError
from gradfold.split import MicroBatch
from gradfold.warning import warn

__all__: list[str] = []

Key: TypeAlias = "tuple[Hashable, int, str]"
"""A call of batch_norm: the structure of the batch, its number in the forward pass, and the name of its layer."""


@dataclass(frozen=True)
class _Known:
    """What the guard has seen of a call.

    Attributes:
        kind: see above.
        is_even: whether every row brings as many values.
    """

    kind: Literal["rows", "one thing"]
    is_even: bool


class Census:
    """Counts the values of each call in one run."""

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names  # by the id of the running mean
        self.counts: list[tuple[str, int]] = []

    def concerns(self, call: BatchNormCall) -> bool:
        """Whether it is one that a window would normalise by the batch; layers are held in evaluation mode here."""
        return call.is_training or id(call.running_mean) in self._names

    def count(self, call: BatchNormCall) -> Tensor:
        """Note a call; gives its result with fixed statistics, which couple no rows."""
        count = call.values.numel() // max(1, call.values.shape[1])
        self.counts.append((self._names.get(id(call.running_mean), UNNAMED), count))
        return by_fixed_statistics(call)


class NormalisedRows:
    """Knows the calls of one accumulator.

    Args:
        is_collated: whether micro-batches are collated one by one.
    """

    def __init__(self, is_collated: bool) -> None:
        self._runs: TriedRuns[list[tuple[str, int]]] = TriedRuns()
        self._structure: Hashable = None  # of the batch in these runs
        self.names: dict[int, str] = {}
        self._is_collated = is_collated
        self._known: dict[Key, _Known] = {}
        self._seen_to_differ: set[Key] = set()
        self._warned_of: set[str] = set()

    def note(self, batch: Batch, counts: list[tuple[str, int]]) -> None:
        """What a run of the guard has counted."""
        self._structure = structure(batch)
        self._runs.note(rows_if_any(batch), counts)

    def judge(self, is_content: bool) -> None:
        """Learn from the guard's runs, where it was content.

        Raises:
            BatchNormError: something besides rows is in the statistics of a call.
        """
        found = self._runs.take()
        if found is None or not is_content:
            return
        if len({tuple(name for name, _ in run.seen) for run in (found.whole, *found.parts)}) > 1:
            return
        first, second = found.parts
        for number, (name, count) in enumerate(found.whole.seen):
            counts = first.seen[number][1], second.seen[number][1]
            if sum(counts) == count:
                is_even = counts[0] * second.num_rows == counts[1] * first.num_rows
                self._known[self._structure, number, name] = _Known("rows", is_even)
            elif counts == (count, count):
                self._known[self._structure, number, name] = _Known("one thing", False)
            else:
                raise _refused_mixture(name, found.whole.num_rows, count, counts)

    def is_one_thing(self, key: Key, parts: Sequence[Moments], micro_batches: Sequence[MicroBatch]) -> bool:
        """Whether all micro-batches bring the very same to a call, which the whole batch would bring once.

        Raises:
            BatchNormError: it should be the same, and is not.
        """
        known = self._known.get(key)
        if known is not None and known.kind == "one thing":
            if not _are_same(parts):
                raise _refused_differing(key[-1], parts[0].count)
            return True
        if self._is_collated and not (known is not None and not known.is_even):
            self._look_for_padding(key[-1], [part.count for part in parts], micro_batches)
        return known is None and self._seems_one_thing(key, parts, micro_batches)

    def _seems_one_thing(self, key: Key, parts: Sequence[Moments], micro_batches: Sequence[MicroBatch]) -> bool:
        """The same where the guard has not looked."""
        if len(parts) == 1 or key in self._seen_to_differ or len({part.count for part in parts}) > 1:
            return False
        if not _are_same(parts) or not bool(parts[0].variance.any()):
            self._seen_to_differ.add(key)
            return False
        if len({len(part.rows) for part in micro_batches}) > 1:
            return True
        self._warn_once(
            "one thing",
            f"BatchNorm in {key[-1]} got the same mean and variance in every micro-batch, all of which have as many "
            "rows. If what it normalises does not come from the batch (prototypes, class embeddings), its running "
            "variance takes it for several: leave self_check on, which tells.",
        )
        return False

    def _look_for_padding(self, layer: str, counts: Sequence[int], micro_batches: Sequence[MicroBatch]) -> None:
        rows = [len(part.rows) for part in micro_batches]
        if not all(rows) or any(count % number for count, number in zip(counts, rows, strict=True)):
            return
        per_row = sorted({count // number for count, number in zip(counts, rows, strict=True)})
        if len(per_row) > 1:
            self._warn_once(
                "padding",
                f"BatchNorm in {layer} normalises {per_row[0]} values per channel for each row of one micro-batch, and "
                f"{per_row[-1]} for each of another. If rows are padded to the longest of their micro-batch, the "
                "padding is in the statistics, and the batch collated as a whole would have more of it: have collate= "
                "pad to one length, or normalise x[mask]. If this is what a mask leaves, or every row is a set of its "
                "own size (a graph's nodes), all is well.",
            )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned_of:
            self._warned_of.add(what)
            warn(message)


def _are_same(parts: Collection[Moments]) -> bool:
    """Bit by bit: the same kernel ran over them."""
    first = next(iter(parts))
    return all(
        part.count == first.count and torch.equal(part.mean, first.mean) and torch.equal(part.variance, first.variance)
        for part in parts
    )


def _refused_mixture(layer: str, num_rows: int, count: int, counts: tuple[int, int]) -> BatchNormError:
    return BatchNormError(
        f"BatchNorm in {layer} normalises {count} values per channel of {num_rows} rows, and {counts[0]} and "
        f"{counts[1]} when these run in two parts: more than rows is in its statistics, which would not be those of "
        "the whole batch. Where prototypes or queries are put beside the rows, give them a BatchNorm (or a call of it) "
        "of their own. Where rows are padded to the longest that runs with them, have collate= pad to one length, or "
        "normalise x[mask]. GroupNorm does not mind: gradfold.convert_batch_norm(model).",
        (layer,),
    )


def _refused_differing(layer: str, count: int) -> BatchNormError:
    return BatchNormError(
        f"BatchNorm in {layer} normalises {count} values per channel however many rows there are, and they are not the "
        "same in every micro-batch (a mean over rows, dropout on prototypes), so that the whole batch would have "
        "others. Normalise before rows are put together, or use GroupNorm: gradfold.convert_batch_norm(model).",
        (layer,),
    )
