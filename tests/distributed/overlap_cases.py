"""Gradients that are summed in the last backward pass of a window."""

from __future__ import annotations

from unittest import mock

import torch
from distributed.alike_cases import uneven
from distributed.ddp_cases import ROWS, cut, gradients, perceptron, regression, regression_batch
from distributed.fault_cases import spared_meetings
from distributed.shard_cases import FailingBackward
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradfold
from gradfold.distributed import failure

F = nn.functional


def overlapped(model, loss_fn, **options):
    options = {"micro_batch_size": 2, **options}
    return gradfold.Accumulator(model, loss_fn, ddp_reduce="in_last_backward", **options)


def windows(rank, size, accumulator, num_windows=3, rows=None):
    """Gradients, loss and the number of reductions of DistributedDataParallel itself in each window."""
    found, batch = [], cut(regression_batch(), uneven(rank, size) if rows is None else rows)
    for _ in range(num_windows):
        accumulator.model.zero_grad()
        result = accumulator.backward(batch)
        found.append((gradients(accumulator.model), result.loss))
    return found


class TwoPaths(nn.Module):
    """Rows of one sign take one path, the others another; the last rows of all ranks take the first alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()

    def forward(self, x, is_both):
        return self.first(x) + self.second(x) if is_both else self.first(x)


def two_paths_batch(rows):
    is_both = torch.zeros(ROWS, 1, dtype=torch.float64)
    is_both[rows.start : rows.start + 2] = 1
    return cut((*regression_batch(), is_both), rows)


def by_two_paths(model, batch):
    x, y, is_both = batch
    return F.mse_loss(model(x, bool(is_both.any())), y)


def unused(rank, size, finds):
    """Some parameters have no gradient in the last micro-batch."""
    model = DistributedDataParallel(TwoPaths(), find_unused_parameters=finds)
    accumulator = overlapped(model, by_two_paths, self_check=False)
    batch = two_paths_batch(slice(0, 6) if rank else slice(6, 12))
    found = []
    for _ in range(2):
        model.zero_grad()
        try:
            accumulator.backward(batch)
            found.append(gradients(model))
        except gradfold.GradfoldError as error:
            found.append((type(error).__name__, str(error), [one.grad for one in model.parameters()]))
    return found


def expect_two_paths(size):
    model = TwoPaths()
    parts = [two_paths_batch(slice(6, 12))] + [two_paths_batch(slice(0, 6))] * (size - 1)
    for batch in parts:
        for x, y, is_both in zip(*(column.split(2) for column in batch), strict=True):
            loss = by_two_paths(model, (x, y, is_both))
            loss.backward(gradient=torch.full_like(loss, 2 / (6 * size)))
    return gradients(model)


def faults(rank, size, where, who):
    """A fault in the second window, on one rank or on all: its end, and that of the third."""
    fails = False

    def loss_fn(model, batch):
        loss = regression(model, batch)
        if fails and where == "an early forward pass" and loss_fn.calls == 0:
            raise ValueError("injected")
        loss_fn.calls += 1
        is_last = loss_fn.calls == accumulator_calls
        return FailingBackward.apply(loss) if fails and is_last and where == "the last backward pass" else loss

    model = DistributedDataParallel(perceptron())
    accumulator = overlapped(model, loss_fn, self_check=False)
    batch = cut(regression_batch(), uneven(rank, size))
    accumulator_calls = -(-len(batch[0]) // 2)
    found = []
    with mock.patch.object(failure, "IN_STEP_S", 0.5), spared_meetings():
        for number in range(3):
            loss_fn.calls, fails = 0, number == 1 and (who == "all" or rank == 0)
            model.zero_grad()
            try:
                accumulator.backward(batch)
                found.append(("right", "", gradients(model)))
            except Exception as error:
                found.append((type(error).__name__, str(error), [one.grad for one in model.parameters()]))
    return found


def without_rows(rank, size):
    """The last rank has rows in every other window."""
    model = DistributedDataParallel(perceptron())
    accumulator, found = overlapped(model, regression), []
    for number in range(4):
        others = size - number % 2
        rows = slice(ROWS * rank // others, ROWS * (rank + 1) // others) if rank < others else slice(0, 0)
        model.zero_grad()
        accumulator.backward(cut(regression_batch(), rows))
        found.append(gradients(model))
    return found


def added(rank, size):
    """Gradients of two windows and of what stood there before add up, in the same tensors."""
    model = DistributedDataParallel(perceptron())
    accumulator, batch = overlapped(model, regression), cut(regression_batch(), uneven(rank, size))
    accumulator.backward(batch)
    before = [one.grad for one in model.parameters()]
    accumulator.backward(batch)
    return gradients(model), all(one.grad is was for one, was in zip(model.parameters(), before, strict=True))


def not_finite(rank, size, policy):
    """NaN on the last rank in the second window."""
    model = DistributedDataParallel(perceptron())
    accumulator, batch = (
        overlapped(model, regression, on_non_finite=policy),
        cut(regression_batch(), uneven(rank, size)),
    )
    found = []
    for number in range(3):
        bad = batch[0] / (0.0 if number == 1 and rank == size - 1 else 1.0)
        model.zero_grad()
        try:
            accumulator.backward((bad, batch[1]))
            found.append(gradients(model))
        except gradfold.LossError as error:
            found.append(type(error).__name__)
    return found


def two_modules(rank, size):
    """Two DistributedDataParallel modules in one model."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4).double(), nn.Linear(4, 1).double()]
    model = nn.ModuleList([DistributedDataParallel(layer) for layer in layers])

    def loss_fn(model, batch):
        return F.mse_loss(model[1](model[0](batch[0]).tanh()), batch[1])

    return windows(rank, size, overlapped(model, loss_fn, self_check=False))


def refused(rank, size):
    """What is not supported, by its error."""
    texts, batch = [], cut(regression_batch(), uneven(rank, size))
    for model, loss_fn, options in (
        (DistributedDataParallel(perceptron(), gradient_as_bucket_view=True), regression, {}),
        (DistributedDataParallel(perceptron().bfloat16()), regression, {}),
        (DistributedDataParallel(perceptron()), regression, {"on_non_finite": "skip_micro_batch"}),
        (DistributedDataParallel(perceptron()), regression, {"batch_norm": "exact"}),
    ):
        try:
            overlapped(model, loss_fn, **options).backward(batch)
            texts.append("")
        except gradfold.OptionError as error:
            texts.append(str(error))
    return texts


def scenes(rank, size):
    """All that leaves the group whole."""
    model = DistributedDataParallel(perceptron())
    weighed = {"weight": lambda batch: batch[1].abs().sum()}
    return {
        "uneven": windows(rank, size, overlapped(model, regression)),
        "one micro-batch": windows(rank, size, overlapped(model, regression, micro_batch_size=None)),
        "weighed": windows(rank, size, overlapped(model, by_target, **weighed)),
        "two modules": two_modules(rank, size),
        "unused, found": unused(rank, size, True),
        "without rows": without_rows(rank, size),
        "added": added(rank, size),
        "refused": refused(rank, size),
        "an error of all in an early forward pass": faults(rank, size, "an early forward pass", "all"),
        "an error of one in an early forward pass": faults(rank, size, "an early forward pass", "one"),
        "an error of all in the last backward pass": faults(rank, size, "the last backward pass", "all"),
        **{policy: not_finite(rank, size, policy) for policy in ("raise", "skip_update")},
    }


def by_target(model, batch):
    """A mean in which rows weigh as their targets."""
    weights = batch[1].abs()
    return ((model(batch[0]) - batch[1]).square() * weights).sum() / weights.sum()
