"""The arms: ways to train the same model on the same samples, each written as one would write it.

An arm is a generator: it trains over the orders of its epochs and yields after every update of the weights. Two arms
train another model, with GroupNorm in place of BatchNorm: one is a full batch again, and the reference of the other.

A training: what every arm trains with, and what it tells of each update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from gradfold.accumulator import Accumulator
from gradfold.batch.nesting import Batch
from gradfold.batchnorm.convert import convert_batch_norm
from gradfold.compare.data import cut, share, share_of_epoch, take, weight_of
from gradfold.compare.measure import Clock
from gradfold.distributed.launch import in_parallel
from gradfold.distributed.process_group import ProcessGroup
from gradfold.engine.backward import BackPropagation, Weighed
from gradfold.engine.loss_terms import LossFn, LossOutput
from gradfold.errors import OptionError
from gradfold.packing.token_budget import TokenBudget
from gradfold.train_step import TrainStep
from gradfold.twophase.loss import wrap_loss
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
class ArmTraining:
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
    ranks: ProcessGroup | None = None

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


LowerPrecision: TypeAlias = Literal["bf16", "fp16"]
LOWER_PRECISIONS: tuple[LowerPrecision, ...] = get_args(LowerPrecision)


def full_batch(training: ArmTraining, epochs: Iterable[Tensor]) -> Iterator[Update]:
    """The reference: each global batch at once, in plain torch."""
    for order in epochs:
        for batch, rows in training.global_batches(order):
            training.optimizer.zero_grad()
            loss = training.loss(batch)
            training.backward(loss)
            training.optimizer.step()
            yield Update(rows, loss.item(), weight_of(training.workload, batch, rows))


def mixed_precision(
    training: ArmTraining, epochs: Iterable[Tensor], precision: LowerPrecision = "bf16"
) -> Iterator[Update]:
    """Each global batch at once, in the recipe of torch's documentation: autocast, and a loss scaler for float16."""
    device, dtype = training.device.type, torch.bfloat16 if precision == "bf16" else torch.float16
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    for order in epochs:
        for batch, rows in training.global_batches(order):
            training.optimizer.zero_grad()
            with torch.autocast(device, dtype):
                loss = training.loss(batch)
            training.backward(scaler.scale(loss))
            scale = scaler.get_scale()
            scaler.step(training.optimizer)
            scaler.update()
            is_applied = scaler.get_scale() >= scale  # it falls where the step was left out
            yield Update(rows, loss.item(), weight_of(training.workload, batch, rows), is_applied)


def gradfold(
    training: ArmTraining,
    epochs: Iterable[Tensor],
    precision: LowerPrecision | None = None,
    batch_norm: Literal["exact"] | None = None,
) -> Iterator[Update]:
    """The library: each global batch in micro-batches, one update; BatchNorm as the workload has it, unless given."""
    return _accumulate(training, epochs, training.micro_batch_size, precision, batch_norm)


def by_tokens(training: ArmTraining, epochs: Iterable[Tensor]) -> Iterator[Update]:
    """The library, with micro-batches of rows of like length, under the workload's budget of padded tokens."""
    return _accumulate(training, epochs, training.token_budget)


def _accumulate(
    training: ArmTraining,
    epochs: Iterable[Tensor],
    micro_batch_size: int | TokenBudget,
    precision: LowerPrecision | None = None,
    batch_norm: Literal["exact"] | None = None,
) -> Iterator[Update]:
    workload = training.workload
    accumulator = Accumulator(
        training.wrapped,
        training.loss_fn,
        micro_batch_size=micro_batch_size,
        weight=workload.weight,
        collate=workload.collate,
        precision=precision,
        batch_norm=batch_norm or workload.batch_norm,
        self_check=False,  # what does not fit is shown here, not refused
    )
    accumulator._back_propagate = TimedBackPropagation(training.clock, accumulator.grad_scaler)
    step = TrainStep(accumulator, training.optimizer)
    for order in epochs:
        for indices in torch.split(order, training.global_batch_size):
            result = step(take(workload, training.own_share(indices)))
            weight = float(len(indices)) if isinstance(result.weight, Mapping) else result.weight
            is_applied = result.applied or accumulator.grad_scaler is None
            yield Update(len(indices), result.loss.item(), weight, is_applied)


def plain_loop(training: ArmTraining, epochs: Iterable[Tensor]) -> Iterator[Update]:
    """The hand-written loop, as articles print it: divide by n, step every n micro-batches and at the end of an epoch.

    Its faults are the subject of the comparison and stay: micro-batches with different numbers of tokens count the
    same, and the last window of an epoch is divided by n however few micro-batches it has.
    """
    n = max(1, training.global_batch_size // (training.micro_batch_size * training.num_ranks))
    for order in epochs:
        training.optimizer.zero_grad()
        window: list[tuple[Tensor | float, float, int]] = []
        num_left = training.num_micro_batches(order)
        for batch, rows in training.micro_batches(order):
            loss = training.loss(batch)
            training.backward(loss / n)
            window.append((loss.detach(), weight_of(training.workload, batch, rows), rows))
            num_left -= 1
            if len(window) == n or num_left == 0:
                training.optimizer.step()
                training.optimizer.zero_grad()
                yield training.of_all_ranks(joined(window))
                window = []


def small_batch(training: ArmTraining, epochs: Iterable[Tensor]) -> Iterator[Update]:
    """No accumulation: an update per micro-batch, with the hyper-parameters of the global batch."""
    for order in epochs:
        for batch, rows in training.micro_batches(order):
            training.optimizer.zero_grad()
            loss = training.loss(batch)
            training.backward(loss)
            training.optimizer.step()
            yield training.of_all_ranks(Update(rows, loss.item(), weight_of(training.workload, batch, rows)))


def reordered(training: ArmTraining, epochs: Iterable[Tensor]) -> Iterator[Update]:
    """The full batch with the rows of each batch in reverse, which changes nothing but rounding."""
    size = training.global_batch_size
    return full_batch(training, (torch.cat([part.flip(0) for part in torch.split(order, size)]) for order in epochs))


def as_it_is(model: nn.Module) -> nn.Module:
    """The workload's own model."""
    return model


REFERENCE = "full-batch"
GROUP_NORM_REFERENCE = "group-norm-full-batch"
BATCH_NORM = "batch-norm-per-micro"
EXACT_BATCH_NORM = "batch-norm-exact"
CONTROL = "reordered"
TOKEN_BUDGET = "token-budget"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: as on the command line.
        description: what it does, for tables and reports.
        train: the loop.
        accumulates: whether one update stands for a whole global batch.
        prepare: makes the model that is trained out of the workload's.
        reference: the arm that trains the same model on full batches; its own name, if it is that arm.
        precision: what forward and loss are computed in by autocast; None: as the workload has it.
    """

    name: str
    description: str
    train: Callable[[ArmTraining, Iterable[Tensor]], Iterator[Update]]
    accumulates: bool = True
    prepare: Callable[[nn.Module], nn.Module] = as_it_is
    reference: str = REFERENCE
    precision: LowerPrecision | None = None

    @property
    def runs_on_one(self) -> bool:
        """Whether it runs in one process though others share the batches of the rest: where it takes them whole."""
        return self.train in (full_batch, reordered) or getattr(self.train, "func", None) is mixed_precision

    @property
    def is_gradfold(self) -> bool:
        """Whether the library trains it, which may choose its micro-batch itself."""
        return getattr(self.train, "func", self.train) is gradfold


def _in_lower_precision(precision: LowerPrecision) -> tuple[Arm, Arm]:
    """The full batch and the library once more, under autocast; measured against the full batch in float32."""
    scaled = "autocast and a loss scaler" if precision == "fp16" else "autocast"
    return (
        Arm(
            f"{REFERENCE}-{precision}",
            f"lower precision without accumulation: each global batch at once, in plain torch with {scaled}",
            partial(mixed_precision, precision=precision),
            precision=precision,
        ),
        Arm(
            f"gradfold-{precision}",
            f'both: each global batch in micro-batches, by gradfold with precision="{precision}"',
            partial(gradfold, precision=precision),
            precision=precision,
        ),
    )


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm(REFERENCE, "the reference: each global batch at once, in plain torch", full_batch),
        Arm("gradfold", "each global batch in micro-batches, by gradfold.Accumulator and TrainStep", gradfold),
        Arm(TOKEN_BUDGET, "by gradfold with a TokenBudget: micro-batches of rows of like length", by_tokens),
        Arm("plain-loop", "the loop as articles print it: loss / n, a step every n micro-batches", plain_loop),
        Arm("small-batch", "no accumulation: an update for every micro-batch", small_batch, accumulates=False),
        Arm(CONTROL, "the control: the full batch with its rows in reverse, which changes rounding alone", reordered),
        Arm(
            EXACT_BATCH_NORM,
            "each global batch by gradfold, BatchNorm normalized by the whole batch, in lock-step",
            partial(gradfold, batch_norm="exact"),
        ),
        Arm(BATCH_NORM, "each global batch by gradfold, BatchNorm normalized by micro-batch", gradfold),
        Arm(
            GROUP_NORM_REFERENCE,
            "the full batch of another model: gradfold.convert_batch_norm puts GroupNorm in the place of BatchNorm",
            full_batch,
            prepare=convert_batch_norm,
            reference=GROUP_NORM_REFERENCE,
        ),
        Arm(
            "group-norm",
            "that other model by gradfold: each global batch in micro-batches",
            gradfold,
            prepare=convert_batch_norm,
            reference=GROUP_NORM_REFERENCE,
        ),
        *_in_lower_precision("bf16"),
        *_in_lower_precision("fp16"),
    )
}
GROUP_NORM_ARMS = tuple(name for name, arm in ARMS.items() if arm.reference == GROUP_NORM_REFERENCE)
_ON_REQUEST = (CONTROL, EXACT_BATCH_NORM, BATCH_NORM, TOKEN_BUDGET, *GROUP_NORM_ARMS)
DEFAULT_ARMS = tuple(name for name, arm in ARMS.items() if name not in _ON_REQUEST and arm.precision is None)


def default_arms(workload: Workload) -> tuple[str, ...]:
    """The arms that answer what one asks of a workload.

    Where rows differ in length, also what a token budget does; with BatchNorm by micro-batch, also what else there is.
    """
    if workload.token_budget is not None:
        return (*DEFAULT_ARMS[:2], TOKEN_BUDGET, *DEFAULT_ARMS[2:])
    if workload.batch_norm != "per_micro_batch":
        return DEFAULT_ARMS
    at = DEFAULT_ARMS.index("gradfold")
    return (*DEFAULT_ARMS[:at], EXACT_BATCH_NORM, BATCH_NORM, *DEFAULT_ARMS[at + 1 :], *GROUP_NORM_ARMS)


def arms_in(precision: str | None) -> tuple[str, ...]:
    """The arms that compute in a lower precision; none for None."""
    return tuple(name for name, arm in ARMS.items() if precision is not None and arm.precision == precision)
