"""The cutting: how the batches of an accumulator become micro-batches, and what it has learned of their size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gradfold import split
from gradfold.batch import Batch
from gradfold.errors import BatchError, WindowError
from gradfold.fitting_size import FittingSize
from gradfold.loader import LoopWindow, Window
from gradfold.memory.auto import Auto, MicroBatchSize, read_auto
from gradfold.memory.choice import MicroBatchChoice
from gradfold.memory.company import Company
from gradfold.memory.sizer import Sizer
from gradfold.memory.specimen import Specimen
from gradfold.memory.work import Work
from gradfold.rows import Rows
from gradfold.split import Collate, CollateRows, MicroBatch
from gradfold.token_budget import TokenBudget
from gradfold.token_split import TokenSplit

__all__: list[str] = []


class Cutting:
    """Cuts batches.

    Args:
        micro_batch_size: as for `Accumulator`.
        collate: as for `Accumulator`.
        counts_samples: whether samples are what is weighed, whose number collation must not change.

    Attributes:
        size: rows, or a budget of padded tokens, to run at once; None: the batch as it is given, and until "auto" has
            chosen.
        fitting: the size that was found to fit in memory.
        sizer: who chooses for "auto".
        by_tokens: who cuts by a token budget.
    """

    def __init__(self, micro_batch_size: MicroBatchSize, collate: Collate | None, counts_samples: bool) -> None:
        self.sizer: Sizer | None = None
        self.by_tokens: TokenSplit | None = None
        self.size: int | TokenBudget | None = None
        if isinstance(micro_batch_size, (str, Auto)):
            self.sizer = Sizer(read_auto(micro_batch_size))
        elif isinstance(micro_batch_size, TokenBudget):
            self.size = micro_batch_size
            self.by_tokens = TokenSplit(micro_batch_size)
            if micro_batch_size.max_tokens == "auto":
                self.sizer = Sizer(Auto())
        else:
            split.check_size(micro_batch_size)
            self.size = micro_batch_size
        self.fitting = FittingSize()
        self._collate = collate
        self._counts_samples = counts_samples

    @property
    def as_measured(self) -> int | TokenBudget | None:
        """The size; a token budget with the cost that was measured."""
        return self.size if self.by_tokens is None else self.by_tokens.budget_as_measured

    def choose(self, batch: Batch, company: Company, work_on: Callable[[Specimen], Work]) -> None:
        """Have the sizer choose, where a choice is due; several that have to come together for it do so once."""
        if self.sizer is None or (company.size > 1 and self.sizer.choice is not None):
            return
        one = batch[0] if isinstance(batch, Window) and batch else batch
        specimen = company.attempt(lambda: Specimen(one, self._collate))
        if not self.sizer.is_due(specimen.num_rows):
            return
        num_rows = self.sizer.choose(work_on(specimen)).micro_batch_size
        if isinstance(self.size, TokenBudget):
            self._set_budget(num_rows * self.size.longest_of(one, specimen.num_rows))
        else:
            self.size = num_rows

    def cut(self, batch: Batch, is_first: bool) -> list[MicroBatch]:
        """The micro-batches of a batch, or of a window; `is_first`: whether the accumulator has seen none before.

        Raises:
            BatchError: it cannot be cut by rows.
            WindowError: it is a window of a loop body.
        """
        if self.by_tokens is not None:
            self.by_tokens.begin()
        return self._cut(batch, is_first)

    def _cut(self, batch: Batch, is_first: bool) -> list[MicroBatch]:
        if isinstance(batch, LoopWindow):
            raise WindowError(
                "this window has a backward of its own; for accumulator.backward(window) leave model= out: "
                "gradfold.windows(loader, n)."
            )
        if isinstance(batch, Window):
            if not batch:
                raise BatchError("the window holds no micro-batches. Skip empty windows.")
            if self.by_tokens is not None and self._collate is not None:  # one pool of samples to choose from
                return self._cut([sample for part in batch for sample in part], is_first)
            return split.join_batches(self._cut(part, is_first) for part in batch)
        size = self.fitting.limit(self._limit)
        if self.by_tokens is not None:
            micro_batches = self.by_tokens.cut(batch, size, self._collate, is_first=is_first)
        elif self._collate is not None:
            micro_batches = split.split_samples(batch, size, self._collate)
        else:
            return split.split_rows(batch, size)
        if self._collate is not None and self._counts_samples:
            split.check_collated(micro_batches)
        return micro_batches

    def largest(self, micro_batches: Sequence[MicroBatch]) -> int:
        """The size of the largest, in rows or in padded tokens: the first one, where they are cut by rows."""
        return len(micro_batches[0].rows) if self.by_tokens is None else max(part.size for part in micro_batches)

    def recut_of(self, batch: Batch) -> Callable[[MicroBatch, int], list[MicroBatch]]:
        """What cuts a micro-batch of this batch further."""
        return partial(split.recut, collate_rows=self.collate_rows(batch))

    def collate_rows(self, batch: Batch) -> CollateRows | None:
        """What collates rows of a list of samples; None where rows need no collation."""
        return None if self._collate is None else partial(_collate_rows, self._collate, batch)

    def note_quiet(self, micro_batches: Sequence[MicroBatch]) -> None:
        """A window of these has gone through without a fault."""
        self.fitting.note_quiet(self.largest(micro_batches), self._limit)
        if self.by_tokens is not None:
            self.by_tokens.settle()

    def state_dict(self) -> dict[str, Any]:
        """What was learned."""
        choice = None if self.sizer is None else self.sizer.choice
        return {
            "fitting_size": self.fitting.state_dict(),
            "token_split": None if self.by_tokens is None else self.by_tokens.state_dict(),
            "max_tokens": self._limit if isinstance(self.size, TokenBudget) else None,
            "micro_batch_choice": None if choice is None else choice.to_json(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, but for sizes in another unit: in rows, say, where padded tokens count.

        A run that was resumed with another option cuts its batches otherwise in any case, and learns anew. A number
        that the user gives counts more than a choice that was saved.
        """
        split_by_tokens = state.get("token_split")
        if (split_by_tokens is None) is not (self.by_tokens is None):
            return
        self.fitting.load_state_dict(state["fitting_size"])
        if self.by_tokens is not None and split_by_tokens is not None:
            self.by_tokens.load_state_dict(split_by_tokens)
        choice = state.get("micro_batch_choice")
        if self.sizer is not None and choice is not None:  # another would cut batches otherwise
            self.sizer.choice = MicroBatchChoice.from_json(choice)
            if isinstance(self.size, TokenBudget):
                self._set_budget(state["max_tokens"])
            else:
                self.size = self.sizer.choice.micro_batch_size

    def _set_budget(self, max_tokens: int) -> None:
        assert isinstance(self.size, TokenBudget) and self.by_tokens is not None
        self.size = self.by_tokens.budget = replace(self.size, max_tokens=max_tokens)

    @property
    def _limit(self) -> int | None:
        """The user's limit, in rows or in padded tokens."""
        size = self.size.max_tokens if isinstance(self.size, TokenBudget) else self.size
        return None if size == "auto" else size  # "auto" until the first batch


def _collate_rows(collate: Collate, batch: Batch, rows: Rows) -> Batch:
    samples = [sample for part in batch for sample in part] if isinstance(batch, Window) else batch
    return collate([samples[row] for row in rows])
