"""A length plan: which rows of a batch share a micro-batch, so that padding and micro-steps cost least.

A micro-batch is padded to the longest of its rows. So rows are sorted, longest first, and cut in that order:

    least[p] = min over e of  cost of a micro-batch of the rows p ... e - 1  +  least[e]

With one length per row this is solved exactly in O(n log n). What row p has to pay for an end e is a line in the length
of row p, so that of two ends the nearer one is the better one from some length on, and stays it ("convex" least weight
subsequences: Galil and Park 1992, doi 10.1016/0304-3975(92)90135-3). Ends out of reach of the budget fit into the same
picture, since the reach moves with p.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from operator import add

import torch
from torch import Tensor

from gradfold.batch.rows import Rows
from gradfold.errors import OptionError

__all__ = ["StepCost"]

_NUM_ENDS = 24  # of a micro-batch that are tried where rows have several lengths


@dataclass(frozen=True)
class StepCost:
    """What a micro-step of a `TokenBudget` costs, forward and backward, in padded tokens.

    `overhead + rows * (length + attention * length**2)`, where `length` is that of the longest row; of several inputs
    of a row the terms add up.

    Args:
        overhead: what a micro-step costs however few tokens it has. None: measured once, in the second window.
        attention: how much dearer a token is for each token of its row. In a Transformer of width d about 1 / (6 d),
            since attention takes 4 L d operations per token and layer beside the 24 d^2 of everything else.

    Raises:
        OptionError: a number is negative or not finite.

    >>> import gradfold
    >>> cost = gradfold.StepCost(overhead=100, attention=1 / (6 * 64))
    >>> cost.of(num_rows=8, lengths=[48])
    532.0
    """

    overhead: float | None = None
    attention: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("overhead", 0 if self.overhead is None else self.overhead), ("attention", self.attention)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < inf:
                raise OptionError(f"StepCost({name}={value!r}): expected a finite number of padded tokens, at least 0.")

    def of(self, num_rows: int, lengths: Sequence[int]) -> float:
        """The cost of a micro-batch: its rows, and the longest length of each input."""
        return (self.overhead or 0.0) + num_rows * sum(length + self.attention * length**2 for length in lengths)


def plan(lengths: Sequence[Tensor], max_tokens: int, cost: StepCost) -> list[tuple[int, ...]]:
    """The rows of each micro-batch, the longest rows first, so that the sum of costs is least.

    `lengths` has for each input of a row (source, target) the length of every row, (rows,) of integers; 0 counts as 1.
    A micro-batch has at most `max_tokens` padded tokens, over all inputs; a row that is longer is alone.
    """
    columns = [length.clamp(min=1) for length in lengths]
    # Where a row has several, rows of like longest length come together: by experiment the best single order.
    order = torch.stack(columns).amax(0).argsort(descending=True, stable=True)
    columns = [length[order] for length in columns]
    cut = _cut_by_one(columns[0], max_tokens, cost) if len(columns) == 1 else _cut_by_all(columns, max_tokens, cost)
    rows, stop = order.tolist(), len(order)
    groups, start = [], 0
    while start < stop:
        groups.append(tuple(rows[start : cut[start]]))
        start = cut[start]
    return groups


def width_of(lengths: Mapping[str, Tensor], rows: Rows) -> int:
    """The padded length of rows that run together, all inputs together."""
    index = torch.tensor(rows)
    return sum(int(length[index].max()) for length in lengths.values())


def _cut_by_one(lengths: Tensor, max_tokens: int, cost: StepCost) -> list[int]:
    """For every start the best end, of rows with one length each, longest first."""
    num = len(lengths)
    positions = torch.arange(num + 1)
    reach = positions[:num] + (max_tokens // lengths).clamp(min=1)  # the furthest end; it moves with the start
    too_far = torch.searchsorted(reach, positions).sub_(1).tolist()  # the last start that an end is out of reach of
    of_row = lengths.double()
    of_row = of_row + cost.attention * of_row**2
    price, falling = of_row.tolist(), of_row.neg().tolist()
    furthest, overhead = reach.tolist(), cost.overhead or 0.0
    least, best = [0.0] * (num + 1), [num] * (num + 1)
    # Ends that are best for some starts ahead, the furthest first, and up to which start each is better than the one
    # before it.
    ends, since, first, last = [num], [num], 0, 0
    for start in range(num - 1, -1, -1):
        while first < last and since[first + 1] >= start:
            first += 1
        end = best[start] = ends[first]
        least[start] = own = overhead + (end - start) * price[start] + least[end]
        if start and price[start] == price[start - 1] and end < furthest[start]:
            continue  # a cut between rows of one length is needed only before a full micro-batch
        # From here on `start` is an end as well. It is better than another one where that is out of reach, or where
        # the rows in between, at the price of a row that is long enough, cost more than by themselves.
        while True:
            end = ends[last]
            from_here = bisect_right(falling, (least[end] - own) / (end - start)) - 1
            if too_far[end] > from_here:  # faster than max()
                from_here = too_far[end]
            if first == last or from_here < since[last]:
                break
            ends.pop()
            since.pop()
            last -= 1
        if from_here >= 0:
            ends.append(start)
            since.append(from_here if from_here < start else start - 1)
            last += 1
    return best


def _cut_by_all(lengths: Sequence[Tensor], max_tokens: int, cost: StepCost) -> list[int]:
    """For every start a good end, of rows with several lengths each.

    There is no line here, and ends are tried one after another as far as the budget goes; where many rows fit at
    once, every second, third, ... may be an end.
    """
    num, overhead = len(lengths[0]), cost.overhead or 0.0
    num_at_once = min(num, max_tokens * num // sum(int(length.sum()) for length in lengths))
    step = max(1, min(num_at_once // _NUM_ENDS, max_tokens // sum(int(length.max()) for length in lengths)))
    ends = [*range(step, num, step), num]
    # Of the rows before each end and after the one before it the longest, for each input, and its price.
    widest = [[max(column[max(0, end - step) : end]) for end in ends] for column in (one.tolist() for one in lengths)]
    prices = [[width + cost.attention * width**2 for width in column] for column in widest]
    least, best = [0.0] * (len(ends) + 1), [num] * (num + 1)
    for first in range(len(ends) - 1, -1, -1):
        start = ends[first - 1] if first else 0
        stop = bisect_right(ends, start + max_tokens // sum(column[first] for column in widest), first + 1)
        num_rows = [end - start for end in ends[first:stop]]
        in_reach = max(1, bisect_right(_padded(widest, first, num_rows), max_tokens))
        spent = map(add, _padded(prices, first, num_rows[:in_reach]), least[first + 1 :])
        lowest, nearest = min(zip(spent, ends[first:], strict=False))
        least[first], best[start] = lowest + overhead, nearest
    return best


def _padded(columns: Sequence[Sequence[float]], first: int, num_rows: Sequence[int]) -> list[float]:
    """For each of these numbers of rows from `first` on, what they take when all are as long as the longest."""
    stop = first + len(num_rows)
    running = [accumulate(column[first:stop], max) for column in columns]
    return [num * sum(longest) for num, longest in zip(num_rows, zip(*running, strict=True), strict=True)]
