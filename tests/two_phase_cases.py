"""Losses that couple the rows of a batch, each as a statistic and a loss; and their page, docs/two-phase.md.

`PYTHONPATH=tests python -m two_phase_cases` writes the table of the page from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reference import gradients, relative_error
from torch import Tensor, nn

import gradfold
from gradfold.batch.split import cut_range

PAGE = Path(__file__).parents[1] / "docs" / "two-phase.md"
ROWS, SIZE = 33, 5  # 7 micro-batches, the last one of 3


@dataclass(frozen=True)
class Case:
    """A loss, with a model and a batch in float64."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss_fn: gradfold.TwoPhaseLoss
    what: str

    def make(self) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        return self.model().double(), self.batch()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def views() -> tuple[Tensor, Tensor]:
    first = numbers(ROWS, 6)
    return first, first + 0.3 * numbers(ROWS, 6, seed=2)


# --- InfoNCE, with a temperature that is trained


def towers() -> nn.Module:
    return nn.ModuleDict({"first": net(6, 4), "second": net(6, 4), "log_scale": nn.Linear(1, 1, bias=False)})


def embed(model, batch):
    return model["first"](batch[0]), model["second"](batch[1])


def contrast(model, embeddings):
    return gradfold.losses.info_nce(*embeddings, temperature=(-model["log_scale"].weight).exp(), tile=8)


# --- Dice: a ratio of sums over all pixels of the batch


def masks() -> tuple[Tensor, Tensor]:
    share = torch.linspace(0.05, 0.95, ROWS, dtype=torch.float64)[:, None, None, None]
    return numbers(ROWS, 2, 5, 5), (torch.sigmoid(numbers(ROWS, 1, 5, 5, seed=3)) < share).double()


def overlap(model, batch):
    guess = model(batch[0]).sigmoid()
    return {"both": (guess * batch[1]).sum(), "guess": guess.sum(), "truth": batch[1].sum()}


def dice(model, sums):
    return 1 - (2 * sums["both"] + 1) / (sums["guess"] + sums["truth"] + 1)


# --- Covariance penalty (VICReg), from moments about a fixed point


def moments(model, batch):
    z = model(batch[0])
    return len(z), z.sum(0), z.T @ z


def covariance_penalty(model, sums):
    num, total, products = sums
    covariance = (products - total[:, None] * total / num) / (num - 1)
    return covariance.triu(1).square().sum() + F.relu(1 - covariance.diagonal().sqrt()).mean()


# --- Barlow Twins


def barlow_twins(model, embeddings):
    first, second = ((z - z.mean(0)) / z.std(0) for z in embeddings)
    correlation = first.T @ second / (len(first) - 1)
    on_diagonal = (correlation.diagonal() - 1).square().sum()
    return on_diagonal + 0.05 * (correlation - correlation.diagonal().diag()).square().sum()


# --- Pearson's correlation, of targets far from zero


def guess(model, batch):
    return {"guess": model(batch[0])[:, 0], "target": batch[1]}


def correlation(model, values):
    return 1 - torch.stack([values["guess"], values["target"]]).corrcoef()[0, 1]


# --- Mixture of experts: each row to one expert, and a penalty for an uneven load


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList([net(6, 3) for _ in range(4)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shares = self.gate(x).softmax(1)
        chosen = shares.argmax(1)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        rows = torch.arange(len(x))
        return outputs[rows, chosen] * shares[rows, chosen, None], shares, chosen


def load(model, batch):
    outputs, shares, chosen = model(batch[0])
    return {
        "error": (outputs - batch[1]).square().sum(),
        "rows": len(chosen),
        "load": torch.bincount(chosen, minlength=4),  # integers, without a gradient
        "share": shares.sum(0),
    }


def balanced(model, sums):
    balance = 4 * (sums["load"] / sums["rows"] * sums["share"] / sums["rows"]).sum()
    return {"task": sums["error"] / (3 * sums["rows"]), "balance": balance}


CASES = [
    Case(
        "InfoNCE, two encoders, dropout, trained temperature",
        lambda: _with_dropout(towers()),
        views,
        gradfold.TwoPhaseLoss(embed, contrast),
        "embeddings, concatenated",
    ),
    Case(
        "Dice over the batch",
        lambda: nn.Conv2d(2, 1, 3, padding=1),
        masks,
        gradfold.TwoPhaseLoss(overlap, dice, combine="sum"),
        "three overlaps, summed",
    ),
    Case(
        "variance and covariance penalty (VICReg)",
        lambda: net(6, 4),
        views,
        gradfold.TwoPhaseLoss(moments, covariance_penalty, combine="sum"),
        "number, sum and products, summed",
    ),
    Case(
        "Barlow Twins",
        towers,
        views,
        gradfold.TwoPhaseLoss(embed, barlow_twins),
        "embeddings, concatenated",
    ),
    Case(
        "1 - Pearson's correlation, targets near 10,000",
        lambda: net(6, 1),
        lambda: (numbers(ROWS, 6), 1e4 + numbers(ROWS, seed=4)),
        gradfold.TwoPhaseLoss(guess, correlation),
        "guesses and targets, concatenated",
    ),
    Case(
        "mixture of experts with a balanced load",
        Experts,
        lambda: (numbers(ROWS, 6), numbers(ROWS, 3, seed=5)),
        gradfold.TwoPhaseLoss(load, balanced, combine="sum"),
        "errors, loads and shares, summed",
    ),
]


def _with_dropout(model: nn.Module) -> nn.Module:
    """Dropout at two depths of each tower, whose draws interleave when a batch is cut."""
    for name in ("first", "second"):
        model[name].insert(1, nn.Dropout(0.2))
        model[name].append(nn.Dropout(0.1))
    return model


def total(output: Any) -> Tensor:
    loss = output[0] if isinstance(output, tuple) else output
    return sum(loss.values()) if isinstance(loss, dict) else loss


def combined(case: Case, parts: list[Any]) -> Any:
    """The statistics of the parts as one, in plain torch."""
    from torch.utils._pytree import tree_map

    if case.loss_fn.combine == "sum":
        return tree_map(lambda *leaves: sum(leaves), *parts)
    return tree_map(lambda *leaves: torch.cat(leaves), *parts)


def reference(case: Case, size: int | None) -> dict[str, Tensor]:
    """The loss of all rows in one graph; micro-batches run after each other in it, so that they draw as gradfold's."""
    model, batch = case.make()
    torch.manual_seed(2)
    parts = []
    for rows in cut_range(ROWS, size):
        parts.append(case.loss_fn.statistic(model, tuple(tensor[rows.start : rows.stop] for tensor in batch)))
    total(case.loss_fn.loss(model, combined(case, parts))).backward()
    return gradients(model)


def two_phase(case: Case, size: int | None) -> dict[str, Tensor]:
    """What gradfold leaves."""
    model, batch = case.make()
    accumulator = gradfold.Accumulator(model, case.loss_fn, micro_batch_size=size)
    torch.manual_seed(2)
    accumulator.backward(batch)
    return gradients(model)


def plain(case: Case, size: int) -> dict[str, Tensor]:
    """Plain accumulation: the mean of the losses of micro-batches, weighted by their rows."""
    model, batch = case.make()
    torch.manual_seed(2)
    for rows in cut_range(ROWS, size):
        micro_batch = tuple(tensor[rows.start : rows.stop] for tensor in batch)
        (total(case.loss_fn(model, micro_batch)) * len(rows) / ROWS).backward()
    return gradients(model)


def plain_error(case: Case) -> float:
    return relative_error(plain(case, SIZE), reference(case, SIZE))


def table() -> str:
    """The table of the page; every line is a test."""
    lines = ["| loss | statistics | `TwoPhaseLoss` | plain accumulation |", "|---|---|---|---|"]
    for case in CASES:
        error = relative_error(two_phase(case, SIZE), reference(case, SIZE))
        assert error < 1e-12
        lines.append(f"| {case.name} | {case.what} | exact | {plain_error(case):.0%} off |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    return re.sub(r"(<!-- table -->\n).*?(<!-- end -->)", lambda m: m[1] + table() + m[2], page, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
