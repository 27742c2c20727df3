"""The training loops, each written as one would write it.

A loop goes over the sample orders of its epochs and yields an `Update` after every step of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import Batch
from gradfold.batchnorm.convert import convert_batch_norm
from gradfold.compare.arms import Arm
from gradfold.compare.data import Sizes, load, split_epoch_for_rank, take_own
from gradfold.compare.measure import Clock
from gradfold.distributed.launch import in_parallel
from gradfold.distributed.process_group import ProcessGroup
from gradfold.engine.loss_terms import LossFn
from gradfold.errors import OptionError
from gradfold.packing.token_budget import TokenBudget
from gradfold.train_step import TrainStep
from gradfold.twophase.loss import wrap_loss
from gradfold.weights import is_sum
from gradfold.workloads.workload import Workload


@dataclass(frozen=True)
class Update:
    """One update of the weights."""

    num_samples: int
    loss: float  # the mean over its samples, before the update
    weight: float  # of that mean in a mean over many updates
    applied: bool = True  # False where a loss scaler found an overflow in the gradient and left the update out


def num_samples(updates: Iterable[Update]) -> int:
    """The samples that went into some updates."""
    return sum(update.num_samples for update in updates)


def mean_loss(updates: Iterable[Update]) -> float:
    """The mean by weight. An update of weight 0 (no token to predict) has the loss NaN, which must not spread."""
    counted = [update for update in updates if update.weight]
    weight = sum(update.weight for update in counted)
    return sum(update.loss * update.weight for update in counted) / weight if weight else float("nan")


class ArmTraining:
    """An arm at its seeded start, and what its training loop works with; `group` as in `Experiment`."""

    def __init__(
        self, arm: Arm, workload: Workload, sizes: Sizes, seed: int, group: ProcessGroup | None = None
    ) -> None:
        self.arm, self.workload, self.sizes, self.group = arm, workload, sizes, group
        torch.manual_seed(seed)
        model = workload.make_model()
        self.model = convert_batch_norm(model) if arm.has_group_norm else model
        self.optimizer = workload.make_optimizer(self.model.parameters())
        self.device = next(self.model.parameters()).device
        self.clock = Clock(self.device)  # of forward and backward passes; the optimizer's hooks measure its steps

    def run(self, orders: Iterable[Tensor]) -> Iterator[Update]:
        """Train over these orders of samples, one per epoch, in training mode."""

        def epochs() -> Iterator[Tensor]:
            for order in orders:
                self.model.train()
                yield order

        return LOOPS[self.arm.loop](self, epochs())

    def micro_batches(self, order: Tensor) -> list[tuple[Tensor, int]]:
        """The micro-batches of an epoch that a data loader hands to this rank, each as indices.

        Each with its number of samples, without those that are repeated to give every rank as many.
        """
        size = self.sizes.micro_batch_size
        rank, num_ranks = (0, 1) if self.group is None else (self.group.rank, self.group.size)
        own, num_left = split_epoch_for_rank(order, self.sizes.global_batch_size, rank, num_ranks)
        parts = enumerate(torch.split(own, size))
        return [(part, max(min(len(part), num_left - number * size), 0)) for number, part in parts]

    @cached_property
    def parallel_model(self) -> nn.Module:
        """The model that the forward pass calls: on several ranks, in a DistributedDataParallel."""
        return self.model if self.group is None else in_parallel(self.model)

    def token_budget(self) -> TokenBudget:
        """The workload's token budget, in proportion to the samples that are run at once; or an `OptionError`."""
        budget = self.workload.token_budget
        if budget is None or budget.max_tokens == "auto":
            raise OptionError(f"workload {self.workload.name!r} has no token budget: leave out --arms token-budget.")
        max_tokens = budget.max_tokens * self.sizes.micro_batch_size // self.workload.micro_batch_size
        return replace(budget, max_tokens=max(1, max_tokens))

    @property
    def loss_fn(self) -> LossFn:
        """The workload's `loss_fn`, timed; of a two-phase loss, each phase."""
        return wrap_loss(self.workload.loss_fn, self.clock.phase("forward"))

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch without its metrics; loss terms are summed."""
        with self.clock.phase("forward"):
            output = self.workload.loss_fn(self.parallel_model, batch)
        terms: Any = output[0] if isinstance(output, tuple) else output
        total: Tensor = torch.stack(list(terms.values())).sum() if isinstance(terms, Mapping) else terms
        return total

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, timed."""
        with self.clock.phase("backward"):
            loss.backward()  # type: ignore[no-untyped-call]

    def weight_of(self, batch: Batch, num: int) -> float:
        """The weight of a batch's loss in a mean over many: the workload's own, or samples where it has several."""
        weight = self.workload.weight
        return float(num) if isinstance(weight, str | Mapping) else float(weight(batch))

    def update(self, window: Sequence[tuple[Tensor, float, int]], applied: bool = True) -> Update:
        """One update from the losses, weights and numbers of samples of its micro-batches, on all ranks."""
        parts = [Update(num, float(loss), weight) for loss, weight, num in window]
        if self.group is not None:
            with self.clock.phase("excluded"):
                parts = list(chain(*self.group.exchange(parts)))
        return Update(num_samples(parts), mean_loss(parts), sum(part.weight for part in parts), applied)


def full_batch(training: ArmTraining, epochs: Iterable[Tensor]) -> Iterator[Update]:
    """Each global batch at once, in plain torch; the reference.

    In a lower precision by the recipe of torch's documentation: autocast, and a loss scaler for float16.
    """
    precision, device = training.arm.precision, training.device.type
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    for order in epochs:
        for indices in torch.split(order, training.sizes.global_batch_size):
            batch = load(training.workload, indices, training.device)
            training.optimizer.zero_grad()
            with torch.autocast(device, dtype, enabled=precision is not None):
                loss = training.loss(batch)
            training.backward(scaler.scale(loss))
            scale = scaler.get_scale()
            scaler.step(training.optimizer)
            scaler.update()
            applied = scaler.get_scale() >= scale  # it falls where the step was left out
            weight = training.weight_of(batch, len(indices))
            yield training.update([(loss.detach(), weight, len(indices))], applied)


def row_order_control(training: ArmTraining, epochs: Iterable[Tensor]) -> Iterator[Update]:
    """The full batch with the rows of each batch in reverse, which changes rounding and nothing else."""
    size = training.sizes.global_batch_size
    return full_batch(training, (torch.cat([part.flip(0) for part in torch.split(order, size)]) for order in epochs))


def gradfold(training: ArmTraining, epochs: Iterable[Tensor]) -> Iterator[Update]:
    """The library: each global batch in micro-batches, one update."""
    arm = training.arm
    budget = training.token_budget() if arm.requires == "token_budget" else None
    accumulator = training.workload.make_accumulator(
        training.parallel_model,
        loss_fn=training.loss_fn,
        micro_batch_size=training.sizes.micro_batch_size if budget is None else None,
        batching=budget,
        precision=arm.precision,
        batch_norm=arm.batch_norm or training.workload.batch_norm,
        self_check=False,  # a gradient that differs is shown here, not refused
    )
    # Timed here, since backward= is not supported with a loss scaler.
    accumulator._back_propagate = training.clock.phase("backward")(accumulator._back_propagate)
    step = TrainStep(accumulator, training.optimizer)
    for order in epochs:
        for indices in torch.split(order, training.sizes.global_batch_size):
            result = step(take_own(training.workload, indices, training.group))
            weight = result.weight
            if isinstance(weight, Mapping) or is_sum(training.workload.weight):
                weight = float(len(indices))
            applied = result.applied or accumulator.grad_scaler is None
            yield Update(len(indices), result.loss.item(), weight, applied)


def plain_loop(training: ArmTraining, epochs: Iterable[Tensor]) -> Iterator[Update]:
    """The hand-written loop, as articles print it: divide by n, step every n micro-batches and at the end of an epoch.

    Its faults are the subject of the comparison and stay: micro-batches with different numbers of tokens count the
    same, and the last window of an epoch is divided by n however few micro-batches it has.
    """
    return _step_every(training.sizes.num_micro_batches, training, epochs)


def small_batch(training: ArmTraining, epochs: Iterable[Tensor]) -> Iterator[Update]:
    """No accumulation: an update per micro-batch, with the hyper-parameters of the global batch."""
    return _step_every(1, training, epochs)


def _step_every(n: int, training: ArmTraining, epochs: Iterable[Tensor]) -> Iterator[Update]:
    for order in epochs:
        training.optimizer.zero_grad()
        window: list[tuple[Tensor, float, int]] = []
        micro_batches = training.micro_batches(order)
        for number, (indices, num) in enumerate(micro_batches, start=1):
            batch = load(training.workload, indices, training.device)
            loss = training.loss(batch)
            training.backward(loss / n)
            window.append((loss.detach(), training.weight_of(batch, num), num))
            if len(window) == n or number == len(micro_batches):
                training.optimizer.step()
                training.optimizer.zero_grad()
                yield training.update(window)
                window = []


LOOPS: dict[str, Callable[[ArmTraining, Iterable[Tensor]], Iterator[Update]]] = {
    loop.__name__: loop for loop in (full_batch, row_order_control, gradfold, plain_loop, small_batch)
}
