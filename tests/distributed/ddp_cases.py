"""Trainings on several ranks: a model, a global batch, how ranks share it, and what one process with all of it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradfold

F = nn.functional
ROWS = 23


def numbers(*shape, seed=0, mean=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() + mean


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def regression_batch(mean=0.0):
    return numbers(ROWS, 3, seed=1, mean=mean), numbers(ROWS, 1, seed=2)


def regression(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


class Tagger(nn.Module):
    """A table used twice (shared), a frozen layer, and one that only some rows use."""

    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4, sparse=sparse)
        self.mix = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.rare = nn.Linear(4, 4)
        self.never = nn.Linear(4, 4)
        self.double()

    def forward(self, ids, is_rare):
        hidden = self.frozen(self.mix(self.table(ids))).tanh()
        if is_rare.any():
            hidden = hidden + self.rare(hidden) * is_rare[:, None, None]
        return hidden @ self.table.weight.T if not self.table.sparse else hidden


def tagging_batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 7, (ROWS, 5), generator=generator)
    labels = torch.randint(0, 4, (ROWS, 5), generator=generator)
    labels[torch.rand(ROWS, 5, generator=generator) < 0.4] = -100
    labels[:4] = -100  # rank 0 has few valid tokens, or none
    is_rare = torch.zeros(ROWS)
    is_rare[-2:] = 1.0  # rows of the last rank
    return {"ids": ids, "labels": labels, "is_rare": is_rare}


def tagging(model, batch):
    logits = model(batch["ids"], batch["is_rare"])
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def tagging_sum(model, batch):
    logits = model(batch["ids"], batch["is_rare"])
    total = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    return total / (batch["labels"] != -100).sum()


def two_terms(model, batch):
    logits = model(batch["ids"], batch["is_rare"])
    tokens = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    terms = {"tokens": tokens, "rows": logits.square().mean()}
    return terms, {"spread": logits.mean().detach(), "per_row": logits.sum((1, 2)).detach()}


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        shares: rows of each rank as fractions are too even: cut points for 1 to 4 ranks.
        micro_batch_sizes: by rank.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss_fn: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel
    micro_batch_sizes: tuple[int | gradfold.TokenBudget | None, ...] = (2, 5, 1, 3)
    found: bool = False  # whether .grad holds something before

    def split_by(self, rank):
        """The options that say how a rank splits its batch."""
        size = self.micro_batch_sizes[rank]
        return {"batching" if isinstance(size, gradfold.TokenBudget) else "micro_batch_size": size}


def wrap_inside(model):
    return nn.ModuleDict({"list": DistributedDataParallel(model)})


def compiled_outside(model):
    return torch.compile(DistributedDataParallel(model), backend="aot_eager")


def compiled_inside(model):
    return DistributedDataParallel(torch.compile(model, backend="aot_eager"))


def through_list(model, batch):
    return regression(model["list"], batch)


TOKENS = gradfold.token_count("labels")


def uneven_batch():
    """Rows of 0 to 5 tokens; those of the first rank are short, and it has few micro-batches."""
    lengths = torch.arange(ROWS) % 6
    is_padding = torch.arange(5) >= lengths[:, None]
    batch = tagging_batch()
    batch["ids"], batch["labels"] = (
        batch["ids"].masked_fill(is_padding, 0),
        batch["labels"].masked_fill(is_padding, -100),
    )
    return batch | {"length": lengths}


BUDGETS = tuple(
    gradfold.TokenBudget(max_tokens, lengths=lambda batch: batch["length"], cost=1) for max_tokens in (30, 8, 17, 5)
)


CASES = {
    "samples": Case(perceptron, regression_batch, regression),
    "samples far from zero": Case(perceptron, lambda: regression_batch(1e4), regression),
    "whole batches": Case(perceptron, regression_batch, regression, micro_batch_sizes=(None,) * 4),
    "gradients found": Case(perceptron, regression_batch, regression, found=True),
    "inside of another module": Case(perceptron, regression_batch, through_list, wrap=wrap_inside),
    "compiled around": Case(perceptron, regression_batch, regression, wrap=compiled_outside),
    "compiled within": Case(perceptron, regression_batch, regression, wrap=compiled_inside),
    "bucket views": Case(
        perceptron,
        regression_batch,
        regression,
        wrap=lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True),
    ),
    "tokens, shared, frozen, rare and unused parameters": Case(Tagger, tagging_batch, tagging, {"weight": TOKENS}),
    "sparse gradients": Case(lambda: Tagger(sparse=True), tagging_batch, tagging, {"weight": TOKENS}),
    "token budgets": Case(Tagger, uneven_batch, tagging, {"weight": TOKENS}, micro_batch_sizes=BUDGETS),
    "two terms and metrics": Case(
        Tagger, tagging_batch, two_terms, {"weight": {"tokens": TOKENS, "rows": "samples", "spread": "samples"}}
    ),
}


def rows_of(rank: int, size: int) -> slice:
    """The rows of a rank: uneven."""
    bounds = [0, *[2, 4, 15][: size - 1], ROWS]
    return slice(bounds[rank], bounds[rank + 1])


def cut(batch, rows):
    return (
        {key: value[rows] for key, value in batch.items()}
        if isinstance(batch, dict)
        else tuple(part[rows] for part in batch)
    )


def gradients(model):
    """By the name that a parameter has without wrappers."""
    return {
        name.replace("_orig_mod.", "").replace("module.", "").removeprefix("list."): (
            None if one.grad is None else one.grad.to_dense().clone()
        )
        for name, one in model.named_parameters()
    }


def run_case(rank, size, name):
    """One window of a case; gives gradients, loss, metrics and weight."""
    case = CASES[name]
    model = case.wrap(case.model())
    batch = cut(case.batch(), rows_of(rank, size))
    accumulator = gradfold.Accumulator(model, case.loss_fn, **case.split_by(rank), self_check=False, **case.options)
    if case.found:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    result = accumulator.backward(batch)
    metrics = {key: value.clone() for key, value in result.metrics.items()}
    return {
        "gradients": gradients(model),
        "loss": result.loss.clone(),
        "metrics": metrics,
        "weight": result.weight,
        "num_samples": result.num_samples,
    }


def run_cases(rank, size, names):
    return {name: run_case(rank, size, name) for name in names}


def expect(name):
    """What one process with the whole batch has: plain torch."""
    case = CASES[name]
    model = case.model()
    wrapped = nn.ModuleDict({"list": model}) if case.wrap is wrap_inside else model
    if case.found:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    output = case.loss_fn(wrapped, case.batch())
    loss, metrics = output if isinstance(output, tuple) else (output, {})
    loss = sum(loss.values()) if isinstance(loss, dict) else loss
    loss.backward()
    return gradients(model), loss.detach(), metrics
