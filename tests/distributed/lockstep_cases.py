"""Exact BatchNorm on several ranks: what each runs, and what one process with all rows gives."""

from __future__ import annotations

import copy

import torch
from distributed.ddp_cases import cut, gradients, numbers
from distributed.scenarios import outcome
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradfold

F = nn.functional
ROWS = 13


class Branching(nn.Module):
    """Two branches of BatchNorm beside each other, one of which a term of the loss may not reach, and a shared one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.a, self.b, self.shared = nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None), nn.BatchNorm1d(4)
        self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.double()

    def forward(self, x):
        x = self.first(x)
        x = self.shared(self.middle(self.a(x).tanh() + self.b(x.sin())))
        x = self.shared(x.exp())
        return self.last(x), self.head(x)


def batch():
    return numbers(ROWS, 3, mean=1.0), torch.arange(ROWS) % 2, torch.tensor([1, 0, 1, -100, -100, 0, 1] + [-100] * 6)


def loss_fn(model, batch):
    main, head = model(batch[0])
    return {"main": F.cross_entropy(main, batch[1]), "head": F.cross_entropy(head, batch[2])}, {"mean": main.mean()}


WEIGHT = {"main": "samples", "head": gradfold.token_count(2)}  # the last rank has no weight for the second term


def rows_of(rank, size):
    """The first rank has most."""
    stops = [ROWS - 2 * (size - 1 - one) for one in range(size)]
    return slice(0 if rank == 0 else stops[rank - 1], stops[rank])


def alone():
    """One process, the whole batch at once."""
    model = Branching()
    losses, _ = loss_fn(model, batch())
    sum(losses.values()).backward()
    return gradients(model), dict(model.named_buffers())


def run(rank, size):
    """All that is looked at, in one start of processes."""
    return {
        "micro-batches": window(rank, size, micro_batch_size=2),
        "one micro-batch each": window(rank, size),
        "a frozen stem and a teacher": frozen(DistributedDataParallel(Branching()), cut(batch(), rows_of(rank, size))),
        "prototypes": prototypes(DistributedDataParallel(Prototypes()), batch()[0][rows_of(rank, size)]),
        "bfloat16": outcome(lambda: half(rank, size)),
        "an error in a forward pass": failing(rank, size, "forward"),
        "an error in the stem's backward pass": failing(rank, size, "stem"),
        "an error between joint calls of the backward pass": failing(rank, size, "backward"),
        "an error before the first forward pass": failing(rank, size, "batch"),
        "an error of the guard": failing(rank, size, "guard"),
        "out of memory": failing(rank, size, "memory"),
        "out of memory in the middle of forward passes": failing(rank, size, "memory in the middle"),
        "out of memory in the backward pass": failing(rank, size, "memory in the backward pass"),
        "other ways": ways(rank, size),
        "other channels": ways(rank, size, wide=True),
        "not finite": not_finite(rank, size),
    }


def windows(rank, size):
    return window(rank, size, micro_batch_size=2), window(rank, size)


def window(rank, size, **options):
    model = DistributedDataParallel(Branching())
    for one in model.module.modules():
        if isinstance(one, nn.BatchNorm1d) and rank:
            one.running_mean.fill_(7.0)  # rank 0's are taken
    accumulator = gradfold.Accumulator(model, loss_fn, batch_norm="exact", weight=WEIGHT, **options)
    result = accumulator.backward(cut(batch(), rows_of(rank, size)))
    buffers = {name: one.clone() for name, one in model.module.named_buffers()}
    return gradients(model.module), buffers, result.num_micro_batches, result.metrics["mean"]


def frozen(model, rows):
    """Layers that need no gradient, and joint calls under no_grad, between others."""
    inner = getattr(model, "module", model)
    inner.first.requires_grad_(False)
    inner.a.requires_grad_(False)
    seen = []

    def with_teacher(model, batch):
        with torch.no_grad():
            target = inner.head(inner.first(batch[0]))
        stem = inner.a(inner.first(batch[0]))
        seen.append(stem.requires_grad)
        main, head = model(batch[0])
        return (main - target).square().mean() + (head + stem[:, :2]).square().mean()

    if model is inner:
        with_teacher(model, rows).backward()
    else:
        gradfold.Accumulator(model, with_teacher, batch_norm="exact", micro_batch_size=2).backward(rows)
    return gradients(inner), dict(inner.named_buffers()), seen


class Prototypes(nn.Module):
    """Rows held against normalized prototypes, which every micro-batch of every rank brings along."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.prototypes = nn.Parameter(torch.randn(5, 3))
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.double()

    def forward(self, x):
        return self.linear(x) @ self.norm(self.prototypes).T


def prototypes(model, rows):
    def squares(model, rows):
        return model(rows).square().mean()

    inner = getattr(model, "module", model)
    if model is inner:
        squares(model, rows).backward()
    else:
        gradfold.Accumulator(model, squares, batch_norm="exact", micro_batch_size=3).backward(rows)
    return gradients(inner), dict(inner.named_buffers())


def half(rank, size):
    model = DistributedDataParallel(Branching().float())
    accumulator = gradfold.Accumulator(
        model, loss_fn, batch_norm="exact", weight=WEIGHT, micro_batch_size=2, precision="bf16"
    )
    rows = cut(batch(), rows_of(rank, size))
    return accumulator.backward((rows[0].float(), *rows[1:])).loss


def full(*_):
    raise torch.OutOfMemoryError("too many rows")


def throw(*_):
    raise ValueError("in the backward pass")


HOOKED = {  # what is to fail there, and in which forward pass
    "stem": (lambda model: model.first.weight.register_hook(throw), 1),
    "backward": (lambda model: model.middle.bias.register_hook(throw), 1),
    "memory in the middle": (lambda model: model.middle.register_forward_pre_hook(full), 2),
    "memory in the backward pass": (lambda model: model.middle.bias.register_hook(full), 1),
}


IN_TWOS = ("guard", "memory", "memory in the backward pass")  # rows at once; else one by one


def failing(rank, size, where):
    """The last rank fails once; what all say, and the window after."""
    model = DistributedDataParallel(Branching())
    calls = 0

    def broken(model, batch):
        nonlocal calls
        if rank < size - 1:
            return loss_fn(model, batch)
        calls += 1
        number = calls  # the others come before this one is at its end
        if where == "guard":
            losses, metrics = loss_fn(model, batch)
            return {name: one * (len(batch[0]) if name == "main" else 1.0) for name, one in losses.items()}, metrics
        if where == "memory":
            full()
        if where == "forward" and number == 2:
            raise ValueError("the second micro-batch")
        hook, at = HOOKED.get(where, (None, 0))
        if number == at:
            hook(model.module)
        return loss_fn(model, batch)

    options = {"batch_norm": "exact", "weight": WEIGHT, "micro_batch_size": 2 if where in IN_TWOS else 1}
    accumulator = gradfold.Accumulator(model, broken, self_check=where == "guard", **options)
    rows = cut(batch(), rows_of(size - 1 - rank if where == "guard" else rank, size))
    if where == "batch" and rank == size - 1:
        rows = (rows[0], rows[1][:1], rows[2])
    before = copy.deepcopy(model.module.state_dict())
    found = outcome(lambda: accumulator.backward(rows))
    is_as_before = all(torch.equal(one, before[name]) for name, one in model.module.state_dict().items())
    has_gradients = any(one is not None for one in gradients(model.module).values())
    return found, is_as_before and not has_gradients, window(rank, size, micro_batch_size=2)


def ways(rank, size, wide=False):
    """The last rank takes another way."""
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(5 if wide else 3), nn.Linear(3, 5), nn.Linear(3, 1)])
    model = DistributedDataParallel(layers.double())

    def loss_fn(model, batch):
        if rank == size - 1:
            return model.module[1](model.module[2](batch) if wide else batch).mean()
        loss = model.module[0](batch).square().mean()
        return loss if wide else loss + model.module[1](batch).mean()

    accumulator = gradfold.Accumulator(model, loss_fn, batch_norm="exact", micro_batch_size=1, self_check=False)
    return outcome(lambda: accumulator.backward(batch()[0][rows_of(rank, size)]))


def not_finite(rank, size):
    model = DistributedDataParallel(Branching())
    rows = list(cut(batch(), rows_of(rank, size)))
    if rank == size - 1:
        rows[0] = rows[0] / 0
    accumulator = gradfold.Accumulator(model, loss_fn, batch_norm="exact", weight=WEIGHT, micro_batch_size=1)
    return outcome(lambda: accumulator.backward(tuple(rows)))
