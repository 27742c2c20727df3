"""Ranks that are not alike: with other rows, options, losses or layers than the others."""

from __future__ import annotations

import torch
from distributed.ddp_cases import ROWS, cut, gradients, perceptron, regression, regression_batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradfold

F = nn.functional


def outcome(model, loss_fn, batch, **options):
    """The gradients, or the name of the error and its text."""
    try:
        gradfold.Accumulator(model, loss_fn, **options).backward(batch)
    except Exception as error:
        return type(error).__name__, str(error)
    return gradients(model)


# --- Windows that are one micro-batch here, and not on all ranks


def normed():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()


def stepping():
    """A parameter steps in its own hook."""
    model = perceptron()
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def summed(model, batch):
    return F.mse_loss(model(batch[0]), batch[1], reduction="sum")


def contrastive(model, batch):
    hidden = model(batch[0])
    distances = (hidden - hidden.T).abs()
    return F.cross_entropy(-distances, torch.arange(len(hidden)).roll(1))


def hardest(model, batch):
    return F.mse_loss(model(batch[0]), batch[1], reduction="none").max()


WHOLE = {
    "sum": (perceptron, summed, regression_batch),
    "hardest row": (perceptron, hardest, regression_batch),
    "contrastive": (perceptron, contrastive, regression_batch),
    "BatchNorm": (normed, regression, regression_batch),
    "a hook that steps": (stepping, regression, regression_batch),
}


def whole(rank, size, name, in_loop):
    """One micro-batch per rank, uneven: what an accumulator says, or a loop over windows."""
    make, loss_fn, make_batch = WHOLE[name]
    model, batch = DistributedDataParallel(make()), cut(make_batch(), uneven(rank, size))
    if not in_loop:
        return outcome(model, loss_fn, batch)
    try:
        for window in gradfold.windows([batch], 1, model=model):
            for part in window:
                window.backward(loss_fn(model, part))
    except Exception as error:
        return type(error).__name__, str(error)
    return gradients(model)


def uneven(rank, size):
    """The first rank has four rows, the others share the rest."""
    bounds = [0, *(4 + (ROWS - 4) * index // (size - 1) for index in range(size))]
    return slice(bounds[rank], bounds[rank + 1])


# --- A rank without rows


def with_metric(model, batch):
    return regression(model, batch), {"error": (model(batch[0]) - batch[1]).abs().mean()}


def collated(samples):
    return tuple(map(torch.stack, zip(*samples, strict=True)))


def empty(rank, size, weight, collate):
    """The last rank has no rows in the second of two windows: gradients, loss and metric of both."""
    model = DistributedDataParallel(perceptron())
    accumulator = gradfold.Accumulator(
        model,
        with_metric,
        micro_batch_size=3,
        weight="samples" if weight == "samples" else (lambda batch: 2.0 * len(batch[0])),
        collate=collated if collate else None,
    )
    found = []
    for others in (size, size - 1):
        rows = slice(ROWS * rank // others, ROWS * (rank + 1) // others) if rank < others else slice(0, 0)
        batch = cut(regression_batch(), rows)
        model.zero_grad()
        result = accumulator.backward(list(zip(*batch, strict=True)) if collate else batch)
        found.append((gradients(model), result.loss, result.metrics["error"], result.num_samples))
    return found


def empty_where_rows_depend(rank, size, is_two_phase):
    """The last rank has no rows, where the others need them to know that."""
    model = DistributedDataParallel(perceptron() if is_two_phase else normed())
    options = {} if is_two_phase else {"batch_norm": "exact"}
    batch = cut(regression_batch(), slice(0, 0) if rank == size - 1 else slice(0, 9))
    return outcome(model, TWO_PHASE if is_two_phase else regression, batch, micro_batch_size=3, **options)


# --- Other options, losses and layers


def two_terms(model, batch):
    return {"a": regression(model, batch), "b": regression(model, batch)}


def three_terms(model, batch):
    return {**two_terms(model, batch), "c": regression(model, batch)}


TWO_PHASE = gradfold.TwoPhaseLoss(
    lambda model, batch: (model(batch[0]), batch[1]), lambda model, seen: F.mse_loss(*seen)
)

DIFFERING = {  # what the last rank has, and the others; what the error names
    "weight": ({"weight": lambda batch: len(batch[0])}, {}, "weight="),
    "names of weights": ({"weight": {"loss": "samples", "b": "samples"}}, {}, "weight="),
    "on_non_finite": ({"on_non_finite": "skip_update"}, {}, "on_non_finite="),
    "batch_norm": ({"batch_norm": "per_micro_batch"}, {}, "batch_norm="),
    "exact batch_norm": ({"batch_norm": "exact"}, {"batch_norm": "per_micro_batch"}, "batch_norm="),
    "precision": ({"precision": "bf16"}, {}, "precision="),
    "loss scaler": ({"precision": "fp16"}, {"precision": "bf16"}, "precision="),
    "two phases": ({"loss_fn": TWO_PHASE}, {}, "loss_fn="),
    "names of terms": ({"loss_fn": two_terms}, {}, "loss terms"),
    "one term more": ({"loss_fn": three_terms}, {"loss_fn": two_terms}, "loss terms"),
    "micro_batch_size": ({"micro_batch_size": 2}, {}, None),
}


def differing(rank, size, name):
    """A window, and the next one with the same options on all ranks."""
    other, common, _ = DIFFERING[name]
    options = {"loss_fn": regression, "micro_batch_size": 3} | (other if rank == size - 1 else common)
    batch = cut(regression_batch(), slice(ROWS * rank // size, ROWS * (rank + 1) // size))
    model = DistributedDataParallel(perceptron())
    found = outcome(model, batch=batch, **options)
    model.zero_grad()
    return found, outcome(model, regression, batch, micro_batch_size=3)


def other_layers(rank, size, layers):
    """Modules that torch does not compare: each rank has a DistributedDataParallel of the same shapes."""
    torch.manual_seed(0)
    names = ["first", "second"] if rank or layers == "same" else ["first", "other"]
    model = nn.ModuleDict({name: DistributedDataParallel(nn.Linear(3, 1).double()) for name in names})
    if layers == "frozen":
        model["second" if rank else "other"].requires_grad_(rank > 0)

    def loss_fn(model, batch):
        return F.mse_loss(sum(part(batch[0]) for part in model.values()), batch[1])

    batch = cut(regression_batch(), slice(ROWS * rank // size, ROWS * (rank + 1) // size))
    return outcome(model, loss_fn, batch, micro_batch_size=3)


def left_loop(rank, size, how):
    """The last rank leaves its loop over the second of two windows: what each rank ends with."""
    model = DistributedDataParallel(perceptron())
    batch = cut(regression_batch(), slice(ROWS * rank // size, ROWS * (rank + 1) // size))
    parts = list(zip(*(column.split(3) for column in batch), strict=True))[:2]
    try:
        for number, window in enumerate(gradfold.windows(parts * 2, 2, model=model)):
            for part in window:
                if rank == size - 1 and number == 1:
                    if how == "error":
                        raise ZeroDivisionError("in the loop")
                    break
                window.backward(regression(model, part))
    except Exception as error:
        return type(error).__name__, str(error)
    return "ended", ""


def uneven_windows(rank, size, num_windows, in_loop):
    """Windows of one loader per rank, in two epochs: what each rank ends with, and how many windows it had."""
    model = DistributedDataParallel(perceptron())
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=3)
    done = 0
    try:
        for _ in range(2):
            parts = [cut(regression_batch(), slice(0, 3))] * (2 * num_windows[rank])
            for window in gradfold.windows(parts, 2, **({"model": model} if in_loop else {})):
                if in_loop:
                    for part in window:
                        window.backward(regression(model, part))
                else:
                    accumulator.backward(window)
                done += 1
    except Exception as error:
        return done, type(error).__name__, str(error), all(one.grad is not None for one in model.parameters())
    return done, "ended", "", True


def late_names(rank, size):
    """Terms and metrics that come and go, on one rank and on all; a rank that starts anew; counts of messages."""
    model = DistributedDataParallel(perceptron())
    batch = cut(regression_batch(), slice(ROWS * rank // size, ROWS * (rank + 1) // size))
    number, is_last = 0, rank == size - 1

    def loss_fn(model, batch):
        loss = regression(model, batch)
        metrics = {"late": loss.detach()} if number == 1 and is_last else {}
        return ({"one": loss, "two": 2 * loss} if number != 3 or not is_last else {"one": loss}), metrics

    def weights(name):
        return lambda batch: 0 if name == "two" and number == 3 and is_last else len(batch[0])

    def accumulate():
        return gradfold.Accumulator(
            model, loss_fn, micro_batch_size=3, weight={name: weights(name) for name in ("one", "two")}
        )

    accumulator, found = accumulate(), []
    for number in range(5):
        if number == 4 and is_last:
            accumulator = accumulate()
            accumulator.num_windows = 4
        model.zero_grad()
        try:
            result = accumulator.backward(batch)
        except Exception as error:
            return found, type(error).__name__, str(error)
        found.append((gradients(model), sorted(result.metrics)))
    return found, "ended", ""


def dropping(rank, size):
    """Counter-based dropout on the last rank alone."""
    model = nn.Sequential(*perceptron(), nn.Dropout(0.5))
    model = DistributedDataParallel(gradfold.convert_dropout(model) if rank == size - 1 else model)
    return outcome(model, regression, cut(regression_batch(), slice(0, 4)), micro_batch_size=2)


def counted(rank, size):
    """How many rows a TrainStep has seen after two uneven batches."""
    model = DistributedDataParallel(perceptron())
    accumulator = gradfold.Accumulator(model, regression, micro_batch_size=3)
    step = gradfold.TrainStep(accumulator, torch.optim.SGD(model.parameters(), 0.1))
    for num_rows in (2 + rank, 0 if rank else 5):
        step(cut(regression_batch(), slice(0, num_rows)))
    return step.samples


def alone(rank, size):
    """A loop over windows of one micro-batch in a group of one process, where hooks see the whole gradient."""
    model, batch = DistributedDataParallel(stepping()), regression_batch()
    for window in gradfold.windows([batch], 1, model=model):
        for part in window:
            window.backward(regression(model, part))
    return gradients(model)
