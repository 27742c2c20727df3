"""What a case of the zoo is, and the small models and batches that the cases share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Setup(NamedTuple):
    """What a user has: `Accumulator(model, loss_fn, **options).backward(batch)`."""

    model: nn.Module
    loss_fn: Callable
    batch: Any
    options: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A set-up, what is true of it, and what gradfold says about it.

    Attributes:
        name: what the set-up is, for the page and as the name of its tests.
        make: builds it: fresh, seeded, small, in float32.
        guard: "fits", "wrong", "warns", "undecided" (silence, since nothing can be seen), or "refused", without a run
            of the self-check.
        cause: `.cause` where it is wrong, the class of the error where it is refused.
        says: a regular expression that the message matches.
        remedy: what to write instead, a line of Markdown.
        why: what couples the rows, or why all is well, a line of Markdown.
        proof: whether plain torch can show the truth: not where the model draws at random, or does not run here.
        in_verify: whether it also goes through `gradfold.verify`.
    """

    name: str
    make: Callable[[], Setup]
    guard: str
    cause: str | None
    says: str
    remedy: str
    why: str
    proof: bool = True
    in_verify: bool = True


def case(
    cases: list[Case], name: str, guard: str, *, cause: str | None = None, says: str = "", **rest: Any
) -> Callable[[Callable[[], Setup]], Callable[[], Setup]]:
    """Decorate a function that builds a set-up: append it to `cases`."""

    def add(function: Callable[[], Setup]) -> Callable[[], Setup]:
        @functools.wraps(function)
        def make() -> Setup:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return function()

        cases.append(Case(name, make, guard, cause, says, **({"remedy": ""} | rest)))
        return make

    return add


def setup(model: nn.Module, loss_fn: Callable, batch: Any, **options: Any) -> Setup:
    """Two micro-batches of 8 rows, unless the options say otherwise."""
    return Setup(model, loss_fn, batch, {"micro_batch_size": 8} | options)


class Module(nn.Module):
    """A module with the given children, buffers and forward, for cases that need a few lines."""

    def __init__(self, forward: Callable, *, buffers: dict[str, Tensor] | None = None, **children: nn.Module) -> None:
        super().__init__()
        self._forward = forward
        for name, child in children.items():
            self.add_module(name, child)
        for name, buffer in (buffers or {}).items():
            self.register_buffer(name, buffer)

    def forward(self, *inputs: Any) -> Any:
        return self._forward(self, *inputs)


def net(outputs: int = 3, inputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


def classes(num_rows: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs (N, 4) and labels (N,) of 3 classes; the first rows of the batch know two of them."""
    labels = torch.arange(num_rows) % 3
    labels[:4] = torch.tensor([0, 1, 0, 1])
    return torch.randn(num_rows, 4), labels


def values(num_rows: int = 16, outputs: int = 3) -> tuple[Tensor, Tensor]:
    """Inputs (N, 4) and targets (N, outputs) that grow by the row, so that rows are of unequal difficulty."""
    return torch.randn(num_rows, 4), torch.randn(num_rows, outputs) * torch.linspace(0.2, 3, num_rows)[:, None]


def two_views(num_rows: int = 16) -> tuple[Tensor, Tensor]:
    first = torch.randn(num_rows, 4)
    return first, first + 0.3 * torch.randn(num_rows, 4)


def images(num_rows: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs (N, 2, 4, 4) and labels (N,) of 3 classes."""
    return torch.randn(num_rows, 2, 4, 4), torch.arange(num_rows) % 3


def masks(num_rows: int = 16) -> tuple[Tensor, Tensor]:
    """Inputs (N, 5, 4) and binary masks (N, 5); the foreground grows by the row."""
    share = torch.linspace(0.1, 0.9, num_rows)[:, None]
    return torch.randn(num_rows, 5, 4), (torch.rand(num_rows, 5) < share).float()


# The first 30 % of the first micro-batch hold few tokens, and so does the second micro-batch.
LENGTHS = (2, 2, 2, 7, 8, 6, 7, 8, 2, 3, 2, 2, 2, 3, 2, 2)


def tokens(ignored: int = -100) -> dict[str, Tensor]:
    """Ids and labels (16, 8), padded on the right with labels that are ignored."""
    outside = torch.arange(8) >= torch.tensor(LENGTHS)[:, None]
    ids, labels = torch.randint(1, 11, (16, 8)), torch.randint(1, 5, (16, 8))
    return {"ids": ids.masked_fill(outside, 0), "labels": labels.masked_fill(outside, ignored)}


def tagger() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5))


def sentences() -> list[tuple[Tensor, Tensor]]:
    """Samples to collate: ids and labels of unequal lengths."""
    return [(torch.randint(1, 11, (length,)), torch.randint(0, 5, (length,))) for length in LENGTHS]


def pad(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Collate: pad to the longest of these samples."""
    ids, labels = zip(*samples, strict=True)
    pad_sequence = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {"ids": pad_sequence(ids, padding_value=0), "labels": pad_sequence(labels, padding_value=-100)}
