"""Small models with all that a fault may damage, and the plain loop that a window must equal. Imports torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

F = nn.functional


class Shared(nn.Module):
    """A sparse table, one weight in two layers, frozen and unused parameters; nothing random."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, sparse=True)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(3, 1).requires_grad_(False)
        self.unused = nn.Linear(3, 3)

    def forward(self, ids):
        return self.frozen(self.second(self.first(self.table(ids)).tanh()).tanh()).mean(1)


class Average(nn.Module):
    """A layer that keeps a moving average in a buffer, which it rebinds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, values):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * values.detach().mean(0)
        return values - self.mean


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))


def buffers() -> nn.Module:
    old, new = torch.nn.utils.spectral_norm(nn.Linear(3, 4)), spectral_norm(nn.Linear(4, 1))
    return nn.Sequential(old, Average(), nn.Dropout(0.3), new)


class Specimen(NamedTuple):
    """A kind of model, the sizes of its batch and micro-batches, and what its accumulator needs."""

    make: Callable[[], nn.Module]
    rows: int
    micro_batch_size: int
    options: Mapping[str, Any] = MappingProxyType({})
    is_random: bool = True


SPECIMENS = {
    "shared and sparse": Specimen(Shared, 8, 3, is_random=False),
    "dropout": Specimen(dropout, 8, 3),
    "running statistics": Specimen(batch_norm, 8, 4, {"batch_norm": "per_micro_batch"}),
    "moving buffers": Specimen(buffers, 5, 3),
}


def build(specimen: Specimen) -> tuple[nn.Module, tuple[Tensor, Tensor, Tensor]]:
    """A model in float64, and its batch: inputs, targets, and the number of each row."""
    torch.manual_seed(1)
    model = specimen.make().double()
    inputs = torch.randn(specimen.rows, 3).double()
    if isinstance(model, Shared):
        inputs = torch.randint(0, 6, (specimen.rows, 2))
    return model, (inputs, torch.randn(specimen.rows, 1).double(), torch.arange(specimen.rows))


class Logged:
    """A loss function that notes the rows of every call."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, model, batch):
        inputs, targets, numbers = batch
        self.calls.append(numbers.tolist())
        output = model(inputs)
        return F.mse_loss(output, targets), {"numbers": numbers, "output": output.mean()}

    def split(self) -> list[list[int]]:
        """The micro-batches that went through, in the order of their runs: of each row the last call counts."""
        last = {row: index for index, rows in enumerate(self.calls) for row in rows}
        split = [rows for index, rows in enumerate(self.calls) if all(last[row] == index for row in rows)]
        assert sorted(row for rows in split for row in rows) == sorted(last), "every row once"
        return split


def plain_loop(model: nn.Module, batch: Sequence[Tensor], split: Iterable[Sequence[int]], loss_fn=None) -> None:
    """Gradient accumulation by hand, added to the gradients found; BatchNorm's statistics advance once, by all rows."""
    loss_fn = loss_fn or Logged()
    split = list(split)
    found = {parameter: parameter.grad for parameter in model.parameters()}
    model.zero_grad()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    before = {norm: (norm.running_mean.clone(), norm.running_var.clone()) for norm in norms}
    seen: dict[nn.Module, list[Tensor]] = {norm: [] for norm in norms}
    handles = [norm.register_forward_hook(lambda norm, args, _: seen[norm].append(args[0].detach())) for norm in norms]
    total = sum(map(len, split))
    for rows in split:
        loss, _ = loss_fn(model, [tensor[rows[0] : rows[-1] + 1] for tensor in batch])
        loss.backward(gradient=torch.full((), len(rows) / total, dtype=loss.dtype))
    for norm, handle in zip(norms, handles, strict=True):
        handle.remove()
        values = torch.cat(seen[norm])
        for running, value, now in zip(
            before[norm], (values.mean(0), values.var(0)), (norm.running_mean, norm.running_var), strict=True
        ):
            now.copy_(0.9 * running + 0.1 * value)
        norm.num_batches_tracked -= len(split) - 1
    with torch.no_grad():
        for parameter, old in found.items():
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
            if old is not None:
                parameter.grad = old if parameter.grad is None else old + parameter.grad
