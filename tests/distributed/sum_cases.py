"""Losses that add up on several ranks: a window of an accumulator, and one of a loop body."""

from __future__ import annotations

from distributed.ddp_cases import ROWS, TOKENS, Tagger, cut, gradients, perceptron, regression_batch, rows_of
from distributed.fsdp_cases import rare_everywhere, shard, whole
from distributed.scenarios import outcome
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradfold

F = nn.functional
TERMS = {"share": "sum", "tokens": TOKENS, "total": "sum"}


def share(model, batch):
    """What rows add to the loss of the whole batch, whose number of rows is known."""
    outputs = model(batch[0])
    return F.mse_loss(outputs, batch[1], reduction="sum") / ROWS, {"mean": outputs.mean().detach()}


def terms(model, batch):
    logits = model(batch["ids"], batch["is_rare"])
    tokens = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    metrics = {"total": logits.sum().detach(), "mean": logits.mean().detach()}
    return {"share": logits.square().sum() / ROWS, "tokens": tokens}, metrics


def uneven(rank, size):
    """No rows on the first rank."""
    rows = rows_of(rank, size)
    return slice(0, 0) if rank == 0 else slice(0 if rank == 1 else rows.start, rows.stop)


CASES = {
    "a share": (perceptron, regression_batch, share, "sum"),
    "a share and a mean": (Tagger, rare_everywhere, terms, TERMS),
}
MICRO_BATCH_SIZES = (2, 5, 1)


def run_cases(rank, size):
    """By case and wrapper: gradients, loss, metrics, weight."""
    results = {}
    wrappers = {"ddp": (DistributedDataParallel, gradients), "shards": (lambda model: shard(model, size), whole)}
    for name, (make, batch, loss_fn, weight) in CASES.items():
        for kind, (wrap, read) in wrappers.items():
            for rows in (rows_of, uneven):
                model = wrap(make())
                accumulator = gradfold.Accumulator(
                    model, loss_fn, micro_batch_size=MICRO_BATCH_SIZES[rank], weight=weight, self_check=kind == "ddp"
                )
                result = accumulator.backward(cut(batch(), rows(rank, size)))
                results[name, kind, rows.__name__] = (
                    *(read(model), result.loss.clone()),
                    *({key: one.clone() for key, one in result.metrics.items()}, result.weight),
                )
    return results


def loop(rank, size):
    """A loop body over its own micro-batches, twice: gradients and loss."""
    model = DistributedDataParallel(perceptron())
    batch, step = cut(regression_batch(), rows_of(rank, size)), MICRO_BATCH_SIZES[rank]
    parts = [cut(batch, slice(start, start + step)) for start in range(0, len(batch[0]), step)]
    for window in gradfold.windows(parts * 2, len(parts), model=model, weight="sum"):
        model.zero_grad()
        for part in window:
            window.backward(share(model, part)[0])
    return gradients(model), window.loss, window.weight


def overlapped(rank, size):
    """Two windows, of which the second sums gradients in the last backward pass."""
    model = DistributedDataParallel(perceptron())
    accumulator = gradfold.Accumulator(
        model, share, micro_batch_size=MICRO_BATCH_SIZES[rank], weight="sum", ddp_reduce="in_last_backward"
    )
    for _ in range(2):
        model.zero_grad()
        result = accumulator.backward(cut(regression_batch(), rows_of(rank, size)))
    return gradients(model), result.loss.clone(), result.weight


def without_the_bad_rows(rank, size):
    """The last row of all is not finite, and left out."""
    inputs, targets = regression_batch()
    targets[-1] = float("nan")
    model = DistributedDataParallel(perceptron())
    accumulator = gradfold.Accumulator(
        model, share, micro_batch_size=1, weight="sum", on_non_finite="skip_micro_batch", self_check=False
    )
    result = accumulator.backward(cut((inputs, targets), rows_of(rank, size)))
    return gradients(model), result.loss.clone(), result.weight


def refused(rank, size):
    """A mean whose weight is "sum"."""
    accumulator = gradfold.Accumulator(
        DistributedDataParallel(perceptron()), lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), weight="sum"
    )
    return outcome(lambda: accumulator.backward(cut(regression_batch(), rows_of(rank, size))))


def run_all(rank, size):
    return {
        **run_cases(rank, size),
        "loop": loop(rank, size),
        "overlapped": overlapped(rank, size),
        "left out": without_the_bad_rows(rank, size),
        "refused": refused(rank, size),
    }


def expect(name, rows=slice(None)):
    """One process with these rows, in plain torch."""
    make, batch, loss_fn, _ = CASES[name]
    model = make()
    loss, metrics = loss_fn(model, cut(batch(), rows))
    loss = sum(loss.values()) if isinstance(loss, dict) else loss
    loss.backward()
    return gradients(model), loss.detach(), metrics
