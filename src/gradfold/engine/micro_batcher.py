"""The cutting: how the batches of an accumulator become micro-batches, and what it has learned of their size.

The fitting size: how much has turned out to fit at once, in rows or in padded tokens, learned where memory ran out.

It shrinks with every recovery. After a long quiet period twice as many are tried again, since what took the memory may
be gone; each time that fails, the next period is twice as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gradfold.batch import split
from gradfold.batch.nesting import Batch
from gradfold.batch.rows import Rows
from gradfold.batch.split import Collate, CollateRows, MicroBatch
from gradfold.distributed.process_group import LocalGroup
from gradfold.errors import BatchError, WindowError
from gradfold.memory.auto import Auto, MicroBatchChoice, MicroBatchSize, read_auto
from gradfold.memory.auto_tune import AutoTuner
from gradfold.memory.probe_batch import ProbeBatch, Work
from gradfold.packing.token_batcher import TokenBatcher
from gradfold.packing.token_budget import TokenBudget
from gradfold.windows import LoadedWindow, LoopWindow

__all__: list[str] = []

_PATIENCE = 256  # windows


class FittingSize:
    """What an accumulator knows about sizes.

    Attributes:
        rows: at most so many at once (padded tokens under a `TokenBudget`); None while nothing has failed.
        proven: so many have gone through at once.
    """

    def __init__(self) -> None:
        self.rows: int | None = None
        self.proven = 0
        self._quiet = 0
        self._patience = _PATIENCE
        self._is_trying = False

    def limit(self, asked: int | None) -> int | None:
        """The micro-batch size to run where `asked` is the user's."""
        if self.rows is None:
            return asked
        return self.rows if asked is None else min(self.rows, asked)

    def shrink(self, rows: int) -> None:
        """More than `rows` did not fit."""
        if self._is_trying:
            self._patience *= 2
        self.rows = rows if self.rows is None else min(self.rows, rows)
        self._quiet, self._is_trying = 0, False

    def note_quiet(self, largest: int, asked: int | None) -> None:
        """A window without a fault went through, with a largest micro-batch of this size."""
        self.proven = max(self.proven, largest)
        if self.rows is None:
            return
        if self._is_trying and largest > self.rows // 2:
            self._is_trying = False  # it fits now
        self._quiet += 1
        if self._quiet >= self._patience:
            self.rows, self._quiet, self._is_trying = 2 * self.rows, 0, True
            if asked is not None and self.rows >= asked:
                self.rows = asked

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to cut its batches as this one would have."""
        return {name.lstrip("_"): value for name, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.rows = state["rows"]
        self.proven = state["proven"]
        self._quiet = state["quiet"]
        self._patience = state["patience"]
        self._is_trying = state["is_trying"]


class MicroBatcher:
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
        self.sizer: AutoTuner | None = None
        self.by_tokens: TokenBatcher | None = None
        self.size: int | TokenBudget | None = None
        if isinstance(micro_batch_size, (str, Auto)):
            self.sizer = AutoTuner(read_auto(micro_batch_size))
        elif isinstance(micro_batch_size, TokenBudget):
            self.size = micro_batch_size
            self.by_tokens = TokenBatcher(micro_batch_size)
            if micro_batch_size.max_tokens == "auto":
                self.sizer = AutoTuner(Auto())
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

    def choose(self, batch: Batch, company: LocalGroup, work_on: Callable[[ProbeBatch], Work]) -> None:
        """Have the sizer choose, where a choice is due; several that have to come together for it do so once."""
        if self.sizer is None or (company.size > 1 and self.sizer.choice is not None):
            return
        one = batch[0] if isinstance(batch, LoadedWindow) and batch else batch
        specimen = company.attempt(lambda: ProbeBatch(one, self._collate))
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
        if isinstance(batch, LoadedWindow):
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
    samples = [sample for part in batch for sample in part] if isinstance(batch, LoadedWindow) else batch
    return collate([samples[row] for row in rows])
