"""A token split: a global batch cut into micro-batches of rows of like length, under a budget of padded tokens.

A stopwatch: what a micro-step costs beside its tokens, from micro-batches of which some are as small as can be.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch
from gradfold.batch.rows import Rows, num_rows
from gradfold.batch.split import Collate, MicroBatch, split_samples
from gradfold.engine.backward import Weighed
from gradfold.engine.window import Backward, Forward, Schedule
from gradfold.errors import BatchError, OptionError
from gradfold.messages import warn
from gradfold.packing.packer import StepCost, plan, width_of
from gradfold.packing.padding import PaddedBatch, PaddingProbe, find_in_samples, find_in_tensors
from gradfold.packing.token_budget import TokenBudget

__all__: list[str] = []


class StepTimer:
    """Goes around a schedule: how long each micro-batch takes, forward and backward."""

    def __init__(self, schedule: Schedule, micro_batches: Sequence[MicroBatch], device: torch.device) -> None:
        self._schedule = schedule
        self._sizes = [part.size for part in micro_batches]
        self._is_probe = [len(part.rows) == 1 for part in micro_batches]
        self._device = device
        self._elapsed_s: dict[int, float] = {}

    def __call__(self, indices: Sequence[int], forward: Forward, backward: Backward) -> None:
        """Run the micro-batches as the schedule does."""
        begun: list[tuple[int, float]] = []

        def timed_forward(index: int) -> Weighed:
            begun.append((index, self._now()))
            return forward(index)

        def timed_backward(weighed: Weighed) -> None:
            backward(weighed)
            index, start = begun[-1]
            self._elapsed_s[index] = self._now() - start

        self._schedule(indices, timed_forward, timed_backward)

    def overhead(self) -> float | None:
        """What a micro-step costs beside its tokens, in tokens; None where these micro-batches do not tell.

        A line through those of one row and the larger ones, each at their medians. A power of two, since the cut is to
        change little with the noise of a clock: near the best cut its cost hardly depends on it.
        """
        largest = max(self._sizes)
        small = [index for index in self._elapsed_s if self._is_probe[index] and self._sizes[index] <= largest / 4]
        large = [index for index in self._elapsed_s if self._sizes[index] > largest / 2]
        if not small or not large:
            return None
        (few, short), (many, long) = (
            (
                statistics.median(self._sizes[index] for index in indices),
                statistics.median(self._elapsed_s[index] for index in indices),
            )
            for indices in (small, large)
        )
        rate = (long - short) / (many - few)
        tokens = largest if rate <= 0 else min(max(short / rate - few, 1.0), largest)
        return float(2 ** round(math.log2(tokens)))

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


_FIRST_OVERHEAD = 64.0  # padded tokens, until it is measured
_NUM_PROBES = 3  # micro-batches of one row that are timed


class TokenBatcher:
    """Cuts one batch after another.

    Attributes:
        budget: the user's.
        overhead: of a micro-step, in padded tokens; None until it is measured.
        is_checked: whether padding was seen not to change the gradient, or whether that cannot be known.
    """

    def __init__(self, budget: TokenBudget) -> None:
        self.budget = budget
        self.overhead = budget.step_cost.overhead
        self.is_checked = False
        self._is_measuring = False
        self._trimmed: Collection[str] = ()  # paths of the tensors
        self._stopwatch: StepTimer | None = None
        self._padded_rows: Callable[[], PaddingProbe] | None = None
        self._longest_warned_of = 0
        self._num_looks = 0  # at the padding
        self._places: dict[str, str] = {}  # that go with the tokens, and with which input

    def cut(self, batch: Batch, limit: int | None, collate: Collate | None, is_first: bool) -> list[MicroBatch]:
        """Cut a nesting of padded tensors, or a list of samples where there is a collate function.

        Args:
            batch: as the user gave it.
            limit: padded tokens that fit, where that is less than the budget.
            collate: the user's.
            is_first: whether nothing has run yet, so that it is too early to measure.

        Raises:
            BatchError: the batch cannot be cut, or its lengths are none.
        """
        total = num_rows(batch) if collate is None else len(split_samples(batch, None, list)[0].rows)
        found = self.budget.lengths_of(batch, total)
        max_tokens = self._limit(limit)
        if collate is not None:
            if self.budget.trim is not None:
                raise OptionError("trim= is for padded tensors; with collate= every micro-batch is padded by itself.")
            widths: Mapping[str, Tensor] = {name: length.clamp(min=1) for name, length in found.items()}
            groups = self._plan(widths, max_tokens, is_first)
            self._padded_rows = self._padded_rows or find_in_samples(batch, collate, widths, groups, self._num_looks)
            return [
                MicroBatch(collate([batch[row] for row in rows]), rows, False, width_of(widths, rows))
                for rows in groups
            ]
        named = {name: self.budget.trim_of(name, list(found)) for name in found}
        trimming = PaddedBatch(batch, found, self.budget.padding_side, named.__getitem__)
        self._trimmed = {*self._trimmed, *trimming.paths}
        self._settle_places(trimming.found)
        groups = self._plan(trimming.widths, max_tokens, is_first)
        self._padded_rows = self._padded_rows or find_in_tensors(trimming, found, groups, max_tokens, self._num_looks)
        if len(groups) == 1 and trimming.width(groups[0]) == trimming.full_width:
            return [MicroBatch(batch, groups[0], width=trimming.full_width)]
        return [MicroBatch(trimming.of_rows(rows), rows, True, trimming.width(rows)) for rows in groups]

    def begin(self) -> None:
        """A window begins: what its batches show of padding is to be looked at, of the first that shows any."""
        self._padded_rows, self._trimmed = None, ()

    def _settle_places(self, places: Mapping[str, str]) -> None:
        """Note what goes with the tokens, as the first batches show it.

        Raises:
            BatchError: this batch shows something else.
        """
        for place, name in places.items():
            if self._places and self._places.get(place) != name:
                before = f"went with {self._places[place]!r}" if place in self._places else "did not go with the tokens"
                raise BatchError(
                    f"batch{place} looks as if it went with the tokens{f' of {name!r}' if name else ''}, and in "
                    f"earlier batches it {before}. Name what does, and with () what does not: trim=(...)."
                )
        self._places = self._places or dict(places)

    def padded_rows(self) -> PaddingProbe | None:
        """Rows of the last batch by which to see whether padding matters; None where all are of one length."""
        self._num_looks += 1
        return None if self._padded_rows is None else self._padded_rows()

    @property
    def budget_as_measured(self) -> TokenBudget:
        """The budget with a cost that is known."""
        return replace(self.budget, cost=self._cost)

    @property
    def _cost(self) -> StepCost:
        overhead = _FIRST_OVERHEAD if self.overhead is None else self.overhead
        return StepCost(overhead, self.budget.step_cost.attention)

    def timed(self, schedule: Schedule, micro_batches: Sequence[MicroBatch], device: torch.device) -> Schedule:
        """The schedule, timed where a micro-step is to be measured."""
        if not self._is_measuring:
            return schedule
        self._stopwatch = StepTimer(schedule, micro_batches, device)
        return self._stopwatch

    def settle(self) -> None:
        """The window is done: learn from what was timed."""
        if self._stopwatch is not None:
            self.overhead = self._stopwatch.overhead()
            self._stopwatch, self._is_measuring = None, False

    def require_position_ids(self) -> None:
        """Raise OptionError where padding is on the left, positions do not come with the batch, and nobody checks."""
        if self.budget.padding_side == "left" and not any("position_ids" in path for path in self._trimmed):
            raise OptionError(
                'padding_side="left" without a check needs position_ids in the batch, since positions that are counted '
                "from the start of a row move when padding is cut off. Leave self_check on, or add them: "
                'batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0), and '
                'trim=("position_ids",).'
            )

    def state_dict(self) -> dict[str, Any]:
        """What was learned, without which a resumed run would cut its batches otherwise."""
        return {"overhead": self.overhead, "is_checked": self.is_checked, "places": dict(self._places)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; what the user says counts more."""
        if self.budget.step_cost.overhead is None:
            self.overhead = state["overhead"]
        self.is_checked = state["is_checked"]
        self._places = dict(state.get("places", {}))

    def _limit(self, limit: int | None) -> int:
        max_tokens = self.budget.max_tokens
        assert isinstance(max_tokens, int)
        return max_tokens if limit is None else min(limit, max_tokens)

    def _plan(self, widths: Mapping[str, Tensor], max_tokens: int, is_first: bool) -> list[Rows]:
        self._warn_of_long(widths)
        groups: list[Rows] = [*plan(list(widths.values()), max_tokens, self._cost)]
        self._is_measuring = self.overhead is None and not is_first
        if self._is_measuring:
            groups = _with_probes(groups)
        return groups if len(groups) > 1 else [range(len(groups[0]))]  # all, in the batch's own order

    def _warn_of_long(self, widths: Mapping[str, Tensor]) -> None:
        longest = int(torch.stack(list(widths.values())).sum(0).max())
        if longest > self._limit(None) and not self._longest_warned_of:
            self._longest_warned_of = longest
            warn(
                f"a row of {longest} tokens is longer than max_tokens={self.budget.max_tokens}: such rows run alone, "
                "and need the memory that they need. (Said once.)"
            )


def _with_probes(groups: list[Rows]) -> list[Rows]:
    """The same with some rows by themselves, taken from the micro-batch with the most rows."""
    largest = max(range(len(groups)), key=lambda index: len(groups[index]))
    rows = groups[largest]
    if len(rows) <= _NUM_PROBES:
        return groups
    probes: list[Rows] = [rows[index : index + 1] for index in range(_NUM_PROBES)]
    return [*groups[:largest], rows[_NUM_PROBES:], *groups[largest + 1 :], *probes]
