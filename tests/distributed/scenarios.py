"""What else can happen on several ranks; each function runs on all of them and gives something to compare."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from distributed.ddp_cases import (
    TOKENS,
    Tagger,
    cut,
    gradients,
    numbers,
    perceptron,
    regression,
    regression_batch,
    rows_of,
    tagging,
    tagging_batch,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradfold

F = nn.functional


def own_rows(rank, size, batch=None):
    return cut(regression_batch() if batch is None else batch, rows_of(rank, size))


def outcome(function):
    """Its value, or the name and text of the error."""
    try:
        return function()
    except Exception as error:
        return type(error).__name__, str(error)


def loop_window(rank, size):
    """A loop body as it was; ranks have windows of unequal length."""
    model = DistributedDataParallel(Tagger())
    rows = own_rows(rank, size, tagging_batch())
    count = len(rows["ids"])
    loader = [cut(rows, slice(start, start + 2)) for start in range(0, count, 2)]
    losses = []
    for window in gradfold.windows(loader, 100, model=model, weight=TOKENS):
        for micro_batch in window:
            window.backward(tagging(model, micro_batch))
        losses.append(window.loss.clone())
    return gradients(model), losses[0]


def two_modules(rank, size):
    """Two DistributedDataParallel modules in one model."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 4).double(), nn.Linear(4, 1).double()]
    model = nn.ModuleList([DistributedDataParallel(layer) for layer in layers])

    def loss_fn(model, batch):
        return F.mse_loss(model[1](model[0](batch[0]).tanh()), batch[1])

    gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(own_rows(rank, size))
    return {name.replace("module.", ""): one.grad.clone() for name, one in model.named_parameters()}


def two_modules_alone():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 4).double(), nn.Linear(4, 1).double()])
    batch = regression_batch()
    F.mse_loss(model[1](model[0](batch[0]).tanh()), batch[1]).backward()
    return gradients(model)


def count_reductions(rank, size):
    """How many gradients are reduced in a window, and how many tensors DistributedDataParallel itself reduces."""
    from gradfold.distributed.process_group import Reduction

    counts = []
    run = Reduction.run

    def counting(self, gradients):
        run(self, gradients)
        counts.append(self.num_reductions)

    Reduction.run = counting
    model = DistributedDataParallel(perceptron())
    gradfold.Accumulator(model, regression, micro_batch_size=1, self_check=False).backward(own_rows(rank, size))
    Reduction.run = run
    return counts


def train(rank, size):
    """Three updates with clipping, momentum and a schedule."""
    model = DistributedDataParallel(perceptron())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=3)
    step = gradfold.TrainStep(accumulator, optimizer, scheduler, max_grad_norm=0.1)
    for _ in range(3):
        step(own_rows(rank, size))
    return {name.removeprefix("module."): one.detach().clone() for name, one in model.named_parameters()}


def train_alone():
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        regression(model, regression_batch()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        scheduler.step()
    return {name: one.detach() for name, one in model.named_parameters()}


def buffers(rank, size):
    """Running statistics: rank 0's at the start of every window, as DistributedDataParallel has it."""
    torch.manual_seed(rank)
    model = DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double())
    model.module[0].running_mean.fill_(float(rank))
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=8, batch_norm="per_micro_batch")
    seen = []
    model.module[0].register_forward_pre_hook(lambda layer, args: seen.append(layer.num_batches_tracked.item()))
    rows = numbers(8, 3, seed=rank), numbers(8, 1, seed=rank)
    accumulator.backward(rows)
    accumulator.backward(rows)
    return model.module[0].running_mean.clone(), model.module[0].num_batches_tracked.item()


def out_of_memory(rank, size):
    """The last rank cannot run more than two rows."""
    model = DistributedDataParallel(perceptron())

    def loss_fn(model, batch):
        if rank == size - 1 and len(batch[0]) > 2:
            raise torch.OutOfMemoryError("too many rows")
        return regression(model, batch)

    accumulator = gradfold.Accumulator(model, loss_fn)
    result = accumulator.backward(own_rows(rank, size))
    return gradients(model), len(result.recoveries)


def not_finite(option):
    def run(rank, size):
        model = DistributedDataParallel(perceptron())
        inputs, targets = own_rows(rank, size)
        if rank == size - 1:
            targets = targets.clone()
            targets[-1] = math.inf

        def loss_fn(model, batch):
            rest = batch[1].isfinite().all(1)
            loss = F.mse_loss(model(batch[0])[rest], batch[1][rest]) if rest.any() else model(batch[0]).mean() * 0
            return loss if rest.all() else loss + (model(batch[0]) * 0).abs().sqrt().sum()  # a gradient of inf * 0

        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=1, on_non_finite=option, self_check=False)
        result = outcome(lambda: accumulator.backward((inputs, targets)))
        if isinstance(result, tuple):
            return result
        return gradients(model), result.is_skipped, result.weight, [str(one) for one in result.recoveries]

    return run


def all_but_the_last_row():
    model = perceptron()
    inputs, targets = regression_batch()
    regression(model, (inputs[:-1], targets[:-1])).backward()
    return gradients(model)


def refusals(rank, size):
    """The errors of set-ups that cannot work."""

    def backward(model, **options):
        return outcome(lambda: gradfold.Accumulator(model, regression, **options).backward(own_rows(rank, size)))

    hooked = DistributedDataParallel(perceptron())
    hooked.register_comm_hook(None, lambda state, bucket: bucket.buffer())
    normalized = nn.Sequential(nn.SyncBatchNorm(3), nn.Linear(3, 1)).double()
    if size > 1:  # it runs on GPUs only, but that is not what it is refused for
        wrapped = DistributedDataParallel(perceptron())
        wrapped.module.extra = normalized[0]
    engine = type("DeepSpeedEngine", (nn.Linear,), {"__module__": "deepspeed.runtime.engine"})(3, 1)
    other = dist.new_group(list(range(size)))
    groups = nn.ModuleList(
        [DistributedDataParallel(perceptron()), DistributedDataParallel(perceptron(), process_group=other)]
    )
    return {
        "unwrapped": backward(perceptron()),
        "alone": backward(perceptron(), distributed=False),
        "static graph": backward(DistributedDataParallel(perceptron(), static_graph=True)),
        "hook": backward(hooked),
        "deepspeed": backward(engine),
        "groups": backward(groups),
        "sync batch norm": backward(wrapped) if size > 1 else None,
    }


def batch_on_one_rank_is_refused(rank, size):
    """A batch that cannot be cut, on one rank: the others are told."""
    model = DistributedDataParallel(perceptron())
    inputs, targets = own_rows(rank, size)
    batch = (inputs, targets[:1].repeat(len(inputs) + 1, 1)) if rank == 0 else (inputs, targets)
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=2)
    first = outcome(lambda: accumulator.backward(batch))
    second = outcome(lambda: accumulator.backward((inputs, targets)))
    return first, gradients(model) if not isinstance(second, tuple) else second


def unlike(change):
    """A window whose parameters do not stand alike on all ranks."""

    def run(rank, size):
        model = DistributedDataParallel(perceptron())
        if rank == 0:
            change(next(model.parameters()))
        return outcome(lambda: gradfold.Accumulator(model, regression).backward(own_rows(rank, size)))

    return run


def give_gradient(parameter):
    parameter.grad = torch.ones_like(parameter)


def nothing_left_on_one_rank(rank, size):
    """All micro-batches of the last rank are left out."""
    model = DistributedDataParallel(perceptron())

    def loss_fn(model, batch):
        loss = regression(model, batch)
        return loss + (model(batch[0]) * 0).abs().sqrt().sum() if rank == size - 1 else loss

    accumulator = gradfold.Accumulator(
        model, loss_fn, micro_batch_size=2, on_non_finite="skip_micro_batch", self_check=False
    )
    result = accumulator.backward(own_rows(rank, size))
    return gradients(model), result.weight


def rows_of_all_but_the_last_rank(size):
    model = perceptron()
    regression(model, cut(regression_batch(), slice(0, rows_of(size - 1, size).start))).backward()
    return gradients(model)


def no_weight_on_one_rank(rank, size):
    """Rank 0 weighs nothing, and has a metric over samples all the same."""
    model = DistributedDataParallel(perceptron())

    def loss_fn(model, batch):
        output = model(batch[0])
        return {"a": F.mse_loss(output, batch[1])}, {"mean": output.mean().detach()}

    weight = {"a": lambda batch: 0 if rank == 0 else len(batch[0])}
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=3, weight=weight, self_check=False)
    result = outcome(lambda: accumulator.backward(own_rows(rank, size)))
    return result if isinstance(result, tuple) else (result.weight, result.metrics["mean"].item())


def mean_output():
    return perceptron()(regression_batch()[0]).mean().item()


def refused_on_one_rank(rank, size):
    """A weight function that fails before the loop over the first window."""
    model = DistributedDataParallel(perceptron())

    def weight(batch):
        if rank == 0:
            raise KeyError("no such key")
        return len(batch[0])

    def run():
        for window in gradfold.windows([own_rows(rank, size)] * 2, 2, model=model, weight=weight):
            for micro_batch in window:
                window.backward(regression(model, micro_batch))

    return outcome(run)


SCENARIOS = {
    "frozen on one rank": unlike(lambda parameter: parameter.requires_grad_(False)),
    "gradient found on one rank": unlike(give_gradient),
    "nothing left on one rank": nothing_left_on_one_rank,
    "no weight on one rank": no_weight_on_one_rank,
    "refused on one rank": refused_on_one_rank,
    "loop window": loop_window,
    "two modules": two_modules,
    "reductions": count_reductions,
    "train": train,
    "buffers": buffers,
    "out of memory": out_of_memory,
    "not finite, raise": not_finite("raise"),
    "not finite, skip_update": not_finite("skip_update"),
    "not finite, skip_micro_batch": not_finite("skip_micro_batch"),
    "refusals": refusals,
    "bad batch": batch_on_one_rank_is_refused,
}


def run_scenarios(rank, size):
    """All of them, errors as their names and texts."""
    return {name: outcome(lambda scenario=scenario: scenario(rank, size)) for name, scenario in SCENARIOS.items()}
