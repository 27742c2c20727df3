"""A training: what every arm trains with, and what it tells of each update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.backward import BackPropagation, Weighed
from gradfold.batch import Batch
from gradfold.compare.measure import Clock
from gradfold.compare.samples import cut, share, share_of_epoch
from gradfold.coupled.two_phase import wrap_loss
from gradfold.errors import OptionError
from gradfold.loss import LossFn, LossOutput
from gradfold.ranks import Ranks
from gradfold.rendezvous import in_parallel
from gradfold.token_budget import TokenBudget
from gradfold.workloads.workload import Workload

__all__: list[str] = []


@dataclass(frozen=True)
class Update:
    """One update of the weights.

    Args:
        num_samples: samples that it consumed.
        loss: their mean loss before the update.
        weight: what that mean counts in the mean over many updates.
        applied: whether the weights were updated; not so where a loss scaler found that the gradient overflowed.
    """

    num_samples: int
    loss: float
    weight: float
    applied: bool = True


@dataclass(frozen=True)
class Training:
    """What every arm trains with.

    Args:
        workload: the workload.
        model: its model.
        optimizer: of the model's parameters.
        global_batch_size: samples of an update, on all ranks together.
        micro_batch_size: samples that each rank runs at once.
        clock: measures forward and backward; the optimizer's hooks measure the update.
        ranks: the processes that share each global batch; None: this one alone.
    """

    workload: Workload
    model: nn.Module
    optimizer: torch.optim.Optimizer
    global_batch_size: int
    micro_batch_size: int
    clock: Clock
    ranks: Ranks | None = None

    @property
    def num_ranks(self) -> int:
        """How many processes share each global batch."""
        return 1 if self.ranks is None else self.ranks.size

    @cached_property
    def wrapped(self) -> nn.Module:
        """The model as a forward pass takes it: for several ranks in a DistributedDataParallel."""
        return self.model if self.ranks is None else in_parallel(self.model)

    def own_share(self, indices: Tensor) -> Tensor:
        """Which samples of a global batch are this rank's."""
        return indices if self.ranks is None else share(indices, self.ranks.rank, self.ranks.size)

    def of_all_ranks(self, update: Update) -> Update:
        """What an update was that each rank saw a share of."""
        if self.ranks is None:
            return update
        with self.clock.phase("excluded"):
            return joined([(one.loss, one.weight, one.num_samples) for one in self.ranks.exchange(update)])

    def global_batches(self, order: Tensor) -> Iterator[tuple[Batch, int]]:
        """The batches of an epoch, as large as an update."""
        return cut(self.workload, order, self.global_batch_size, self.device)

    def micro_batches(self, order: Tensor) -> Iterator[tuple[Batch, int]]:
        """The batches of an epoch, as large as fits: what a loader of a hand-written loop gives on this rank.

        Each with its number of rows, without those that were repeated so that every rank has as many.
        """
        own, num_left = self._own_order(order)
        for batch, rows in cut(self.workload, own, self.micro_batch_size, self.device):
            yield batch, min(rows, num_left)
            num_left = max(num_left - rows, 0)

    def num_micro_batches(self, order: Tensor) -> int:
        """How many of them there are on each rank."""
        return -(-len(self._own_order(order)[0]) // self.micro_batch_size)

    def _own_order(self, order: Tensor) -> tuple[Tensor, int]:
        if self.ranks is None:
            return order, len(order)
        return share_of_epoch(order, self.global_batch_size, self.ranks.rank, self.ranks.size)

    @property
    def token_budget(self) -> TokenBudget:
        """The workload's, in proportion to the samples that are run at once.

        Raises:
            OptionError: it has none.
        """
        budget = self.workload.token_budget
        if budget is None or budget.max_tokens == "auto":
            raise OptionError(f"workload {self.workload.name!r} has no token budget: leave out --arms token-budget.")
        max_tokens = budget.max_tokens * self.micro_batch_size // self.workload.micro_batch_size
        return replace(budget, max_tokens=max(1, max_tokens))

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter."""
        return next(self.model.parameters()).device

    def call_loss_fn(self, model: nn.Module, batch: Batch) -> LossOutput:
        """The workload's `loss_fn`, timed."""
        with self.clock.phase("forward"):
            output: LossOutput = self.workload.loss_fn(model, batch)
        return output

    @property
    def loss_fn(self) -> LossFn:
        """The same for the library; of a two-phase loss each phase by itself."""

        def timed(loss_fn: LossFn) -> LossFn:
            def call(model: nn.Module, batch: Batch) -> LossOutput:
                with self.clock.phase("forward"):
                    return loss_fn(model, batch)

            return call

        return wrap_loss(self.workload.loss_fn, timed)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch without its metrics; loss terms are summed."""
        output = self.call_loss_fn(self.wrapped, batch)
        terms: Any = output[0] if isinstance(output, tuple) else output
        total: Tensor = torch.stack(list(terms.values())).sum() if isinstance(terms, Mapping) else terms
        return total

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, timed."""
        with self.clock.phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]


class TimedBackPropagation(BackPropagation):
    """The library's own backward pass, timed; `backward=` of the accumulator would not go with a loss scaler."""

    def __init__(self, clock: Clock, grad_scaler: torch.amp.GradScaler | None) -> None:
        super().__init__(grad_scaler=grad_scaler)
        self._clock = clock

    def __call__(self, terms: Weighed) -> None:
        """Back-propagate the terms."""
        with self._clock.phase("backward"):
            super().__call__(terms)


def joined(window: Sequence[tuple[Tensor | float, float, int]]) -> Update:
    """One update of these losses, weights and numbers of samples."""
    weight = sum(weight for _, weight, _ in window)
    loss = sum(float(loss) * weight for loss, weight, _ in window if weight) / weight if weight else float("nan")
    return Update(sum(rows for _, _, rows in window), loss, weight)
