"""Token batches: a global batch split into micro-batches of rows of similar length, under a budget of padded tokens.

What a micro-step costs beside its tokens is measured once, in a window with some micro-batches of a single row.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch
from gradfold.batch.rows import Rows, num_rows
from gradfold.batch.split import Collate, MicroBatch, MicroBatcher, num_samples
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.strategy import Run, Strategy
from gradfold.engine.window import Window
from gradfold.errors import BatchError, OptionError
from gradfold.messages import warn
from gradfold.packing.packer import StepCost, plan, width_of
from gradfold.packing.padding import PaddedBatch
from gradfold.packing.padding_check import PaddingCheck, PaddingProbe, find_in_samples, find_in_tensors
from gradfold.packing.token_budget import TokenBudget
from gradfold.state.snapshot import Snapshot


class StepTimer:
    """Times the micro-batches of a strategy, forward and backward, where they run one after another."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._timed: list[tuple[MicroBatch, float]] = []

    def run(self, window: Window, indices: Sequence[int], snapshot: Snapshot) -> None:
        """Run the micro-batches as the strategy does."""
        if not self._strategy.is_sequential(window.context):
            self._strategy.run(window, indices, snapshot)
            return
        for index in indices:
            start = _now(window.device)
            self._strategy.run(window, [index], snapshot)
            self._timed.append((window.micro_batches[index], _now(window.device) - start))

    def overhead(self) -> float | None:
        """What a micro-step costs beside its tokens, in tokens; None where these micro-batches do not tell.

        A line through those of one row and the larger ones, each at their medians. A power of two, since the cut is to
        change little with the noise of a clock: near the best cut its cost hardly depends on it.
        """
        timed = self._timed
        largest = max((part.size for part, _ in timed), default=0)
        small = [(part.size, s) for part, s in timed if len(part.rows) == 1 and part.size <= largest / 4]
        large = [(part.size, s) for part, s in timed if part.size > largest / 2]
        if not small or not large:
            return None
        (few, short), (many, long) = (map(statistics.median, zip(*both, strict=True)) for both in (small, large))
        rate = (long - short) / (many - few)
        tokens = largest if rate <= 0 else min(max(short / rate - few, 1.0), largest)
        return float(2 ** round(math.log2(tokens)))


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


_FIRST_OVERHEAD = 64.0  # padded tokens, until it is measured
_NUM_PROBES = 3  # micro-batches of one row that are timed


@final
class TokenBatcher(MicroBatcher):
    """Splits batches into micro-batches of rows of similar length; see `MicroBatcher` for its arguments."""

    unit = "padded tokens"
    saved: ClassVar[Mapping[str, Any]] = {
        **MicroBatcher.saved,
        **{"overhead": (None, "number"), "is_checked": "flag", "has_run": "flag", "places": {"*": "text"}},
    }

    def __init__(self, budget: TokenBudget, collate: Collate | None = None, counts_samples: bool = False) -> None:
        super().__init__(budget.max_tokens if isinstance(budget.max_tokens, int) else None, collate, counts_samples)
        self._budget = budget
        self.overhead = budget.step_cost.overhead  # of a micro-step, in padded tokens; None until it is measured
        self.is_checked = False  # whether padding does not change the gradient, or that cannot be known
        self._has_run = False
        self._trimmed: Collection[str] = ()  # paths of the tensors
        self._timer: StepTimer | None = None
        self._probes: list[Callable[[int], PaddingProbe | None]] = []  # of each piece of the last batch
        self._has_warned_of_long = False
        self._num_looks = 0  # at the padding
        self._places: dict[str, str] = {}  # that go with the tokens, and with which input

    @property
    def budget(self) -> TokenBudget:
        """The user's budget, with the number of tokens that "auto" has found, and the cost that was measured."""
        max_tokens = self._budget.max_tokens if self.size is None else self.size
        return replace(self._budget, max_tokens=max_tokens, cost=self._cost)

    def split(self, batch: Batch, may_be_empty: bool = False) -> list[MicroBatch]:
        """The micro-batches of a batch, or of a window of micro-batches."""
        self._probes, self._trimmed = [], ()
        return super().split(batch, may_be_empty)

    def _split_pieces(self, pieces: Sequence[Batch], limit: int | None) -> list[MicroBatch]:
        if self._collate is None:
            return super()._split_pieces(pieces, limit)
        return self._split([sample for piece in pieces for sample in piece], limit)  # one pool to choose from

    def _split(self, batch: Batch, limit: int | None) -> list[MicroBatch]:
        assert limit is not None  # "auto" has found one
        if self._collate is None:
            return self._split_tensors(batch, limit)
        return self._split_samples(batch, limit, self._collate)

    def _split_samples(self, batch: Batch, limit: int, collate: Collate) -> list[MicroBatch]:
        total = num_samples(batch)
        if self._budget.trim is not None:
            raise OptionError("trim= is for padded tensors; with collate= every micro-batch is padded by itself.")
        self._samples = batch
        found = self._budget.lengths_of(batch, total)
        widths = {name: length.clamp(min=1) for name, length in found.items()}
        groups = self._plan(widths, limit)
        self._probes.append(partial(find_in_samples, batch, collate, widths, groups))
        return [
            MicroBatch(collate([batch[row] for row in rows]), rows, width=width_of(widths, rows)) for rows in groups
        ]

    def _split_tensors(self, batch: Batch, limit: int) -> list[MicroBatch]:
        found = self._budget.lengths_of(batch, num_rows(batch))
        named = {name: self._budget.trim_of(name, list(found)) for name in found}
        padded = PaddedBatch(batch, found, self._budget.padding_side, named)
        self._trimmed = {*self._trimmed, *padded.paths}
        self._settle_places(padded.found)
        groups = self._plan(padded.widths, limit)
        self._probes.append(partial(find_in_tensors, padded, found, groups, limit))
        if len(groups) == 1 and width_of(padded.widths, groups[0]) == padded.full_width:
            return [MicroBatch(batch, groups[0], width=padded.full_width)]
        return [MicroBatch(padded.of_rows(rows), rows, True, width_of(padded.widths, rows)) for rows in groups]

    def _settle_places(self, places: Mapping[str, str]) -> None:
        """Note what goes with the tokens, as the first batches show it; raise BatchError where this one differs."""
        for place, name in places.items():
            if self._places and self._places.get(place) != name:
                before = f"went with {self._places[place]!r}" if place in self._places else "did not go with the tokens"
                raise BatchError(
                    f"batch{place} looks as if it went with the tokens{f' of {name!r}' if name else ''}, and in "
                    f"earlier batches it {before}. Name what does, and with () what does not: trim=(...)."
                )
        self._places = self._places or dict(places)

    def check_padding(self, window: Window, probe_loss: LossFn, can_check: bool) -> bool:
        """Check once that padding does not change the gradient, by rows of this batch; whether that is settled.

        Raises:
            PaddingError, BatchError: as `PaddingCheck.run`.
            OptionError: padding is on the left, where it easily does, and rows cannot run by themselves.
        """
        if self.is_checked:
            return True
        if not can_check:
            if self._budget.padding_side == "left" and not any("position_ids" in path for path in self._trimmed):
                raise OptionError(
                    'padding_side="left" without a check needs position_ids in the batch, since positions that are '
                    "counted from the start of a row move when padding is cut off. Leave self_check on, or add them: "
                    'batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0), and '
                    'trim=("position_ids",).'
                )
            return True
        look, self._num_looks = self._num_looks, self._num_looks + 1
        rows = next((found for found in (find(look) for find in self._probes) if found is not None), None)
        if rows is not None:
            window.weights.wait()  # another rank may have failed, which is not for the check to see
            self.is_checked = PaddingCheck(window, probe_loss, rows, self._budget.padding_side).run()
        return self.is_checked

    @property
    def _is_measuring(self) -> bool:
        return self.overhead is None and self._has_run

    @property
    def _cost(self) -> StepCost:
        return StepCost(_FIRST_OVERHEAD if self.overhead is None else self.overhead, self._budget.step_cost.attention)

    def timed(self, strategy: Strategy) -> Run:
        """The `run` of a strategy, timed where a micro-step is to be measured."""
        self._timer = StepTimer(strategy) if self._is_measuring else None
        return (self._timer or strategy).run

    def largest(self, micro_batches: Sequence[MicroBatch]) -> int:
        """The padded tokens of the largest of some micro-batches."""
        return max((part.size for part in micro_batches), default=0)

    def learn(self, micro_batches: Sequence[MicroBatch]) -> None:
        """A window of these micro-batches has gone through without a fault; learn from what was timed."""
        super().learn(micro_batches)
        self._has_run = True
        if self._timer is not None:
            self.overhead, self._timer = self._timer.overhead(), None

    def resize(self, num_rows: int, batch: Batch, rows_of_batch: int) -> None:
        """Run as many tokens at once as this many of the longest rows have."""
        self.size = num_rows * max(1, _longest(self._budget.lengths_of(batch, rows_of_batch)))

    def state_dict(self) -> dict[str, Any]:
        """What was learned, without which a resumed run would split its batches otherwise."""
        learned = {"overhead": self.overhead, "is_checked": self.is_checked, "places": dict(self._places)}
        return {**super().state_dict(), **learned, "has_run": self._has_run}

    def load_state_dict(self, state: Mapping[str, Any], with_size: bool) -> bool:
        """Restore what `state_dict` returned; what the user says counts more."""
        if not super().load_state_dict(state, with_size):
            return False
        if self._budget.step_cost.overhead is None:
            self.overhead = state["overhead"]
        self.is_checked = state["is_checked"]
        self._places = dict(state["places"])
        self._has_run = state["has_run"]
        return True

    def _plan(self, widths: Mapping[str, Tensor], max_tokens: int) -> list[Rows]:
        longest = _longest(widths)
        if self.size is not None and longest > self.size and not self._has_warned_of_long:
            self._has_warned_of_long = True
            warn(
                f"a row of {longest} tokens is longer than max_tokens={self.size}: such rows run alone, whatever "
                "memory they need. (Said once.)"
            )
        groups: list[Rows] = [*plan(list(widths.values()), max_tokens, self._cost)]
        if self._is_measuring:
            groups = _with_probes(groups)
        return groups if len(groups) > 1 else [range(len(groups[0]))]  # all, in the batch's own order


def _longest(lengths: Mapping[str, Tensor]) -> int:
    """The tokens of the longest row, all inputs together."""
    return int(torch.stack(list(lengths.values())).sum(0).max())


def _with_probes(groups: list[Rows]) -> list[Rows]:
    """The same with some rows by themselves, taken from the micro-batch with the most rows."""
    largest = max(range(len(groups)), key=lambda index: len(groups[index]))
    rows = groups[largest]
    if len(rows) <= _NUM_PROBES:
        return groups
    probes: list[Rows] = [rows[index : index + 1] for index in range(_NUM_PROBES)]
    return [*groups[:largest], rows[_NUM_PROBES:], *groups[largest + 1 :], *probes]
