"""THE ENGINE: a window is the micro-batches of one update; it makes one gradient out of them, or leaves no trace.

What it equals, for a loss that is a mean over something (samples, tokens) of which the batch holds W and micro-batch k
holds w[k]:

    loss_fn(model, batch).backward()        ==        for k, micro_batch in enumerate(micro_batches):
                                                          loss_fn(model, micro_batch).backward(gradient=w[k] / W)

The weight enters as the seed of the backward pass, so that no operation is added to the graph:

    [1] open       set aside .grad, keep the buffers that change, record the random state
    [2] cut        split, collate, weigh: w[0] ... w[K-1] and W are known
    [3] run        forward 0, backward 0, forward 1, backward 1, ...   (or another schedule)
    [4] close      loss and metrics of the window; add to .grad what was set aside
    [5] replay     where memory runs out or a gradient is not finite: undo the micro-batch, or all of [3], and run again
    [6] roll back  on any other exception after [1]: everything as it was at [1]

[1], the end of [4], and [6] are `transaction.py`; [2] is `split.py` and `weight.py`; [5] is `replay.py`. Losses that
couple the samples of a batch need another order of forwards and backwards. They plug in as a `Schedule`.

A recovery: what was done in a window about memory that ran out, or about a gradient that was not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import in_own_containers
from gradfold.batch.rows import Rows, name_rows
from gradfold.batch.split import MicroBatch, versions
from gradfold.engine.backward import BackPropagation, Weighed
from gradfold.engine.loss_terms import LossFn, LossTerms, read_pair
from gradfold.engine.metrics import Metrics
from gradfold.engine.prefetch import prefetch
from gradfold.errors import BatchError
from gradfold.weights import WindowWeights

__all__ = ["Recovery", "WindowResult"]

Unit: TypeAlias = Literal["rows", "padded tokens"]


@dataclass(frozen=True)
class Recovery:
    """One fault that a window survived.

    Attributes:
        cause: "out_of_memory" or "non_finite".
        action: "halved" (more, smaller micro-batches), "skipped_micro_batch" (left out, its weight taken out of the
            denominator) or "skipped_update" (no gradient was left).
        rows: the rows of the batch where it happened.
        micro_batch_size: rows (padded tokens with a `TokenBudget`) run at once from there on; 0 where they were
            skipped.
        replayed: whether the window began again; else the micro-batches that were done were kept.
        changes_randomness: whether random numbers (dropout masks) are others than without the fault.
        changes_batch_statistics: whether BatchNorm layers normalized by other, smaller micro-batches.
        unit: what `micro_batch_size` counts.
    """

    cause: Literal["out_of_memory", "non_finite"]
    action: Literal["halved", "skipped_micro_batch", "skipped_update"]
    rows: Rows
    micro_batch_size: int
    replayed: bool
    changes_randomness: bool = False
    changes_batch_statistics: bool = False
    unit: Unit = "rows"

    def __str__(self) -> str:
        where = name_rows(self.rows)
        if self.action == "halved":
            unit = self.unit[:-1] if self.micro_batch_size == 1 else self.unit
            text = f"out of memory at {where}: went on with {self.micro_batch_size} {unit} at once"
        elif self.action == "skipped_micro_batch":
            text = f"the gradient of {where} was not finite: left out"
        else:
            text = f"the gradient of {where} was not finite: no update"
        changed = [
            name
            for name, has_changed in (
                ("random numbers", self.changes_randomness),
                ("BatchNorm's statistics", self.changes_batch_statistics),
            )
            if has_changed
        ]
        return text + (f" ({' and '.join(changed)} differ from those of a run without the fault)" if changed else "")


@dataclass(frozen=True)
class WindowResult:
    """What a window gave besides the gradient.

    Attributes:
        loss: the loss of the whole batch, of all ranks (the sum of its terms' means), 0-d, detached, on the device; NaN
            where the window weighs nothing.
        metrics: by name: weighted means over all ranks (0-d), rows of this rank in the batch's own order, and the means
            of named loss terms.
        num_micro_batches: how many micro-batches were run on this rank.
        num_samples: rows of the batch of this rank.
        weight: the denominator of the loss, over all ranks, or one per term where weights were given by name.
        recoveries: the faults that the window survived, in order.
        is_skipped: whether no gradient was left since it was not finite (`on_non_finite=`).
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
    num_micro_batches: int
    num_samples: int
    weight: float | Mapping[str, float]
    recoveries: tuple[Recovery, ...] = ()
    is_skipped: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether the window weighed nothing, and so left no gradient."""
        weights = self.weight.values() if isinstance(self.weight, Mapping) else [self.weight]
        return not any(weights)


Forward: TypeAlias = Callable[[int], Weighed]
"""Runs `loss_fn` on the micro-batch of this index; gives its loss terms, with their graph."""

Backward: TypeAlias = Callable[[Weighed], None]
"""Back-propagates what a forward gave."""

Schedule: TypeAlias = Callable[[Sequence[int], Forward, Backward], None]
"""Runs the forward of every index, then the backward of what it gave, in an order of its own: the seam for coupled
batches."""


RunAgain: TypeAlias = Callable[[], None]
"""Runs the forward and the backward of a micro-batch once more."""

AfterFirst: TypeAlias = Callable[[RunAgain], None]
"""Called when the first micro-batch has been back-propagated, whose gradient stands in `.grad`."""


def one_after_another(indices: Sequence[int], forward: Forward, backward: Backward) -> None:
    """The plain schedule: one micro-batch's activations are alive at a time."""
    for index in indices:
        backward(forward(index))


class Window:
    """A window being run: its micro-batches, and what those that are done gave.

    Attributes:
        current: the micro-batch that was begun last.
        looks_at_idle: whether micro-batches that weigh nothing are run for their metrics though none has come yet.
        runs_idle: whether they are run as the others, since these depend on their rows.
        is_looked_at: whether the self-check has seen it.
        after_first: who waits for the gradient of the first micro-batch; whoever undoes it must run it again.
        around: what goes around a forward pass, told the rows.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        micro_batches: Sequence[MicroBatch],
        weigh: Callable[[Sequence[MicroBatch]], WindowWeights],
        back_propagate: BackPropagation,
        device: torch.device,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.micro_batches = micro_batches
        self.weigh = weigh
        self.weights = weigh(micro_batches)
        self.idle = self.weights.idle()
        self.back_propagate = back_propagate
        self.device = device
        self.take = prefetch(micro_batches, device)
        self.losses = LossTerms(micro_batches, self.weights, device)
        self.metrics = Metrics(micro_batches, self.weights, device)
        self.num_samples = sum([len(part.rows) for part in micro_batches])
        self.done: frozenset[int] = frozenset()  # before it was cut anew
        self.current = 0
        self.looks_at_idle = False
        self.runs_idle = False
        self.is_looked_at = False
        self.after_first: AfterFirst | None = None
        self.around: Callable[[Rows], AbstractContextManager[object]] | None = None
        # What was cut has begun at version 0.
        self._versions = [None if part.is_cut else versions(part) for part in micro_batches]

    def again(self, micro_batches: Sequence[MicroBatch], done: Mapping[int, int] = MappingProxyType({})) -> Window:
        """The window with other micro-batches; those that are done keep their place: their indices here, there."""
        window = Window(self.model, self.loss_fn, micro_batches, self.weigh, self.back_propagate, self.device)
        window.num_samples = self.num_samples
        window.is_looked_at = self.is_looked_at
        window.around = self.around
        window.done = frozenset(done.values())
        for before, now in done.items():
            window._versions[now] = self._versions[before]
        window.losses.carry_over(self.losses, done)
        window.metrics.carry_over(self.metrics, done)
        return window

    def check_unchanged(self, index: int) -> None:
        """Raise BatchError where `loss_fn` has written to a micro-batch, which then cannot run again.

        Where rows are copied to a device it writes to the copy.
        """
        now, before = versions(self.micro_batches[index]), self._versions[index]
        if any(now) if before is None else now != before:
            raise BatchError(
                f"loss_fn has changed micro-batch {index}{self.micro_batches[index].where} in place, so that it would "
                "not run on the same rows again. Let it work on a copy: inputs = inputs.clone()."
            )

    def run(self, schedule: Schedule) -> None:
        """Step [3]: every micro-batch that is not done yet."""
        # Idle micro-batches come last: only then is it known whether there are metrics to be had from them.
        order = [index for index in range(len(self.micro_batches)) if index not in self.idle] + sorted(self.idle)
        backward = self.back_propagate if self.after_first is None else self._backward
        schedule([index for index in order if index not in self.done], self.forward, backward)

    def result(self) -> WindowResult:
        """The first half of step [4], once the losses are settled."""
        loss, metrics = self.losses.close()
        terms = {*self.losses.names, *self.losses.sums}  # those of other ranks as well
        self.metrics.check_names(terms)
        metrics.update(self.metrics.close())
        num_run = len(self.micro_batches) - (0 if self.runs_idle else len(self.idle))
        return WindowResult(loss, metrics, num_run, self.num_samples, self.weights.total(terms))

    def check_names(self) -> None:
        """Raise WeightError where a weight has no loss term or metric, once the losses are settled."""
        terms = {*self.losses.names, *self.losses.sums}
        self.weights.check_names(terms, self.metrics.all_names)

    def forward(self, index: int) -> Weighed:
        """The loss terms of a micro-batch, with their graph."""
        self.current = index
        if index in self.idle and not self.runs_idle:
            return self._forward_idle(index)
        output = self.call(index)
        if isinstance(output, tuple):
            output, metrics = read_pair(output)
            self.metrics.add(index, metrics)
        return self.losses.add(index, output)

    def call(self, index: int) -> Any:
        """What `loss_fn` returns for a micro-batch."""
        self.current = index
        if self.around is None:
            return self.loss_fn(self.model, in_own_containers(self.take(index)))
        with self.around(self.micro_batches[index].rows):
            return self.loss_fn(self.model, in_own_containers(self.take(index)))

    def _backward(self, weighed: Weighed) -> None:
        self.back_propagate(weighed)
        if self.after_first is not None:
            after_first, self.after_first = self.after_first, None
            after_first(partial(self._run_again, self.current))

    def _run_again(self, index: int) -> None:
        self.back_propagate(self.forward(index))

    def _forward_idle(self, index: int) -> Weighed:
        """A micro-batch that weighs nothing is looked at only where there are metrics to be had from it."""
        if self.metrics.names or self.looks_at_idle:
            with torch.no_grad():
                output = self.call(index)
            if isinstance(output, tuple):
                self.metrics.add(index, read_pair(output)[1])
        return []
