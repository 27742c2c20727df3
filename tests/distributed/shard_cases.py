"""Faults, and terms without weight, where parameters are sharded over ranks."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from unittest import mock

import torch
from distributed.ddp_cases import ROWS, cut, numbers, regression
from distributed.fault_cases import FailAt, spared_meetings
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradfold
from gradfold.distributed import failure

F = nn.functional


class TwoHeads(nn.Module):
    """Two tasks on one trunk; `sizes` of the heads."""

    def __init__(self, sizes=(4, 4)):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.first, self.second = nn.Linear(3, 5), nn.Linear(5, sizes[0]), nn.Linear(5, sizes[1])
        self.double()

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        return self.first(hidden), self.second(hidden)


def mesh_of(size, suffix=""):
    """As that of `fsdp_cases`, by other names: torch finds the groups of an equal mesh that is gone."""
    shape, names = ((2, 2), (f"copies{suffix}", f"parts{suffix}")) if size == 4 else ((size,), (f"parts{suffix}",))
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def shard(model, size, is_nested, suffix="", **options):
    mesh = mesh_of(size, suffix)
    if is_nested:
        for layer in model.children():
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def batch():
    """Each row belongs to one task: the first third to the first, then by turns, the last rows to the second."""
    mine = torch.arange(ROWS) % 2 == 0
    mine[: ROWS // 3], mine[-ROWS // 3 :] = True, False
    return {"x": numbers(ROWS, 3, seed=1), "y": numbers(ROWS, seed=2), "is_first": mine.double()}


def two_tasks(model, batch):
    first, second = model(batch["x"])
    is_first = batch["is_first"]

    def mean(output, mask):
        losses = (output.sum(1) - batch["y"]).square() * mask
        return losses.sum() / mask.sum().clamp(min=1)

    return {"first": mean(first, is_first), "second": mean(second, 1 - is_first)}


WEIGHT = {"first": lambda batch: batch["is_first"].sum(), "second": lambda batch: (1 - batch["is_first"]).sum()}


def rows_of(rank, size):
    return slice(ROWS * rank // size, ROWS * (rank + 1) // size)


def whole(model):
    return {name: None if p.grad is None else p.grad.full_tensor().clone() for name, p in model.named_parameters()}


def heads(rank, size, is_nested, reduce, sizes):
    """Ranks whose rows are of one task alone, in the middle also of both."""
    model = shard(TwoHeads(sizes), size, is_nested)
    accumulator = gradfold.Accumulator(
        model, two_tasks, micro_batch_size=2 + rank, weight=WEIGHT, fsdp_reduce=reduce, self_check=False
    )
    result = accumulator.backward({name: part[rows_of(rank, size)] for name, part in batch().items()})
    return whole(model), result.loss


HEADS = [
    (is_nested, reduce, sizes)
    for is_nested in (False, True)
    for reduce in ("per_micro_batch", "per_window")
    for sizes in ((4, 4), (4, 7))
]


def expect(sizes=(4, 4)):
    model = TwoHeads(sizes)
    loss = sum(two_tasks(model, batch()).values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.detach()


class FailingBackward(torch.autograd.Function):
    """Passes on, and raises in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ValueError("injected")


CALLS = [f"{kind} {number}" for kind in ("forward", "backward") for number in (1, 2, 3)]


POINTS = range(1, 400, 10)  # operators


FAULTS = [
    (is_nested, reduce, finds)
    for is_nested in (False, True)
    for reduce in ("per_micro_batch", "per_window")
    for finds in (False, True)
]


OPERATORS = [(reduce, keeps) for reduce in ("per_micro_batch", "per_window") for keeps in (False, True)]


def rows():
    return numbers(ROWS, 3, seed=1), numbers(ROWS, 1, seed=2)


def both_heads(model, batch):
    return F.mse_loss(torch.cat(model(batch[0]), 1), batch[1].expand(-1, 8))


def failing(rank, size, is_nested, reduce, finds, points, keeps=False, suffix=""):
    """An error on all ranks at some points, in one training: what is left in `.grad`, and the next window's."""
    model = shard(TwoHeads(), size, is_nested, suffix)
    model.set_reshard_after_backward(not keeps)
    shards = dict(model.named_parameters())
    batch = cut(rows(), rows_of(rank, size))
    calls, fails_at = [0], [""]

    def loss_fn(model, batch):
        calls[0] += 1
        loss = both_heads(model, batch)
        if fails_at[0] == f"forward {calls[0]}":
            raise ValueError("injected")
        return FailingBackward.apply(loss) if fails_at[0] == f"backward {calls[0]}" else loss

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, fsdp_reduce=reduce, self_check=False)
    found = []
    for point in points:
        for shard_of in shards.values():
            shard_of.grad = None
        if finds:
            calls[0], fails_at[0] = 0, ""
            accumulator.backward(batch)
        before = {name: one.grad for name, one in shards.items()}
        copies = {name: None if one is None else one.to_local().clone() for name, one in before.items()}
        calls[0], fails_at[0] = 0, point if isinstance(point, str) else ""
        mode = FailAt(0 if isinstance(point, str) else point, lambda: torch.OutOfMemoryError("injected"))
        try:
            with mode:
                accumulator.backward(batch)
            ended = "right"
        except (ValueError, torch.OutOfMemoryError):
            ended = "failed"
        is_as_before = all(
            one.grad is before[name] and (one.grad is None or torch.equal(one.grad.to_local(), copies[name]))
            for name, one in shards.items()
        )
        for shard_of in shards.values():
            shard_of.grad = None
        calls[0], fails_at[0] = 0, ""
        accumulator.backward(batch)
        gradients = {name: None if one.grad is None else one.grad.full_tensor() for name, one in shards.items()}
        found.append((ended, is_as_before, gradients))
    return found


def failing_alone(rank, size, reduce, point, number):
    """A fault on the first rank, after a window that went well, and the next window.

    Gives what both end with on this rank, and what each has added to `.grad`, over the gradient of a window.
    """
    model = shard(TwoHeads(), size, True, suffix=f" {number}")
    shards = dict(model.named_parameters())
    batch = cut(rows(), rows_of(rank, size))
    fails = False

    def loss_fn(model, batch):
        loss = both_heads(model, batch)
        if fails and point == "forward":
            raise ValueError("injected")
        return FailingBackward.apply(loss) if fails and point == "backward" else loss

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, fsdp_reduce=reduce, self_check=False)
    accumulator.backward(batch)
    before = {name: one.grad.to_local().clone() for name, one in shards.items()}  # the gradient of one window
    fails = rank == 0
    mode = FailAt(point if fails and not isinstance(point, str) else 0, lambda: torch.OutOfMemoryError("injected"))
    found, num_added = [], []
    with mock.patch.object(failure, "IN_STEP_S", 0.3), spared_meetings():
        for setting in (mode, nullcontext()):
            try:
                with setting:
                    accumulator.backward(batch)
                found.append(("right", ""))
            except Exception as error:
                found.append((type(error).__name__, str(error)))
            fails = False
            added = [(one.grad.to_local() / before[name]).flatten() - 1 for name, one in shards.items()]
            num_added.append(torch.cat(added))
    return found, num_added


def expect_both():
    model = TwoHeads()
    both_heads(model, rows()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def not_finite(rank, size, policy):
    """NaN in one row of the last rank, where modules stay gathered after a backward pass: what shards hold."""
    model = shard(TwoHeads(), size, True)
    model.set_reshard_after_backward(False)
    shards = list(model.parameters())
    accumulator = gradfold.Accumulator(model, both_heads, micro_batch_size=3, on_non_finite=policy, self_check=False)
    batch = cut(rows(), rows_of(rank, size))
    bad = batch[0].clone()
    if rank == size - 1:
        bad[0] = torch.nan
    try:
        accumulator.backward((bad, batch[1]))
        ended = "skipped"
    except gradfold.LossError as error:
        ended = type(error).__name__
    left = [one.grad is None for one in shards]
    accumulator.backward(batch)
    return ended, left, [None if one.grad is None else one.grad.full_tensor() for one in shards]


def said(rank, size):
    """What is warned of, or refused."""
    texts = []
    batch = cut(rows(), rows_of(rank, size))
    accumulator = gradfold.Accumulator(shard(TwoHeads(), size, True), both_heads, micro_batch_size=3)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accumulator.backward(batch)
        texts.append([str(one.message) for one in caught])
    small = shard(TwoHeads().bfloat16(), size, True)
    try:
        gradfold.Accumulator(small, regression, self_check=False).backward(batch)
    except gradfold.OptionError as error:
        texts.append(str(error))
    return texts


def in_double(rank, size):
    """With float64 as the default dtype."""
    model = shard(TwoHeads(), size, True)
    batch = cut(rows(), rows_of(rank, size))
    torch.set_default_dtype(torch.float64)
    try:
        gradfold.Accumulator(model, both_heads, micro_batch_size=3, self_check=False).backward(batch)
        return whole(model)
    finally:
        torch.set_default_dtype(torch.float32)


def sweep(rank, size, points):
    """Memory that runs out at some operators, on all ranks."""
    return {
        (reduce, keeps): failing(rank, size, True, reduce, True, points, keeps, f" {len(points)}")
        for reduce, keeps in OPERATORS
    }


def scenes(rank, size):
    """All of the above, in one set of processes: torch keeps meshes by what they are equal to, and not their groups."""
    return {
        "heads": {case: heads(rank, size, *case) for case in HEADS},
        "calls": {case: failing(rank, size, *case, CALLS) for case in FAULTS},
        "not finite": {policy: not_finite(rank, size, policy) for policy in ("raise", "skip_update")},
        "said": said(rank, size),
        "in double": in_double(rank, size),
    }
