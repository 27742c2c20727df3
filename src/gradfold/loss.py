"""A loss: what `loss_fn` returned for each micro-batch, checked, and combined over the window when it closes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gradfold.errors import LossError, NonFiniteLossError
from gradfold.split import MicroBatch
from gradfold.weight import Shares, WindowWeights

__all__: list[str] = []

LossOutput: TypeAlias = "Tensor | Mapping[str, Tensor] | tuple[Tensor | Mapping[str, Tensor], Mapping[str, Any]]"
LossFn: TypeAlias = Callable[[Any, Any], LossOutput]

BARE = "loss"  # the name of a loss that is not a dict of terms


def read_output(output: LossOutput) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """What `loss_fn` returned, as loss terms and metrics.

    Raises:
        LossError: it is something else, or a term is not a 0-d floating point tensor.
    """
    metrics: Mapping[str, Any] = {}
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping):
        output, metrics = output
    terms = _terms(output)
    for name, term in terms.items():
        if term.dim() != 0 or not term.dtype.is_floating_point:
            raise LossError(_not_a_mean(name, term))
    return terms, metrics


def _terms(loss: object) -> dict[str, Tensor]:
    if isinstance(loss, Tensor):
        return {BARE: loss}
    # A transformers ModelOutput is a mapping too, and has tensors that are no losses: those fail the check of shapes.
    if isinstance(loss, Mapping) and loss and all(isinstance(term, Tensor) for term in loss.values()):
        return dict(loss)
    hint = " Return output.loss." if hasattr(loss, "loss") else ""
    raise LossError(
        f"loss_fn returned a {type(loss).__name__}; expected a 0-d tensor (a mean), a dict of them by term, or a pair "
        f"of such a loss and a dict of metrics.{hint}"
    )


def _not_a_mean(name: str, term: Tensor) -> str:
    return (
        f"the loss term {name!r} has shape {tuple(term.shape)} and dtype {term.dtype}; expected a 0-d floating point "
        "tensor, the mean over the micro-batch: use reduction='mean', or write loss.mean()."
    )


class Tally:
    """The losses and metrics of a window's micro-batches, in the order of the micro-batches, not of their runs."""

    def __init__(self, micro_batches: list[MicroBatch], weights: WindowWeights, device: torch.device) -> None:
        self._micro_batches = micro_batches
        self._weights = weights
        self._device = device
        self._losses: dict[str, dict[int, Tensor]] = {}
        self._parts: dict[str, tuple[float, ...]] = {}
        self._metrics: dict[str, dict[int, Tensor]] = {}

    @property
    def has_metrics(self) -> bool:
        """Whether any micro-batch so far came with metrics."""
        return bool(self._metrics)

    def add(self, index: int, terms: Mapping[str, Tensor], metrics: Mapping[str, Any]) -> list[tuple[Tensor, float]]:
        """Take what `loss_fn` returned for micro-batch `index`.

        Returns:
            The terms that weigh something, each with the part of the window's mean that it makes up.
        """
        if not self._parts:
            self._weights.check_names(terms, metrics)
            self._parts = {name: self._weights.of_term(name).parts for name in terms}
            self._losses = {name: {} for name in terms}
        weighed = []
        for name, parts in self._parts.items():
            if parts[index] == 0:
                continue  # a mean over nothing, which may be NaN
            if name not in terms:
                raise self._names_differ(index, terms)
            term = terms[name]
            weighed.append((term, parts[index]))
            self._losses[name][index] = term.detach()
        if not terms.keys() <= self._parts.keys():
            raise self._names_differ(index, terms)
        for name, value in metrics.items():
            if name in terms:
                raise LossError(f"{name!r} is both a loss term and a metric: rename the metric.")
            self._metrics.setdefault(name, {})[index] = self._read_metric(name, value, index)
        return weighed

    def close(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the window, and its metrics with the mean of each named loss term; detached, on the device.

        The losses are read from the device in one transfer, to see that they are finite, and averaged in float64.
        The loss is NaN where nothing weighs anything; a term that weighs nothing adds nothing to it.

        Raises:
            NonFiniteLossError: a loss is not finite; names the first micro-batch to blame.
        """
        entries = [(name, index) for name, of_term in self._losses.items() for index in of_term]
        losses = [self._losses[name][index] for name, index in entries]
        if not losses:
            return torch.tensor(math.nan, device=self._device), self._combine_metrics()
        values = torch.stack(losses).tolist()
        if not all(map(math.isfinite, values)):
            self._raise_non_finite(dict(zip(entries, values, strict=True)))
        means = dict.fromkeys(self._losses, 0.0)
        for (name, index), value in zip(entries, values, strict=True):
            means[name] += self._parts[name][index] * value
        dtype = losses[0].dtype if losses[0].dtype.itemsize >= 4 else torch.float32
        loss = torch.tensor(sum(means.values()), dtype=dtype, device=self._device)
        metrics = self._combine_metrics()
        if BARE not in means:
            for name, mean in means.items():
                known = mean if self._losses[name] else math.nan
                metrics[name] = torch.tensor(known, dtype=dtype, device=self._device)
        return loss, metrics

    def _combine_metrics(self) -> dict[str, Tensor]:
        return {name: self._combine(name, values) for name, values in self._metrics.items()}

    def _read_metric(self, name: str, value: Any, index: int) -> Tensor:
        if isinstance(value, bool | int | float):
            return torch.tensor(float(value), dtype=torch.float64)
        if not isinstance(value, Tensor):
            raise LossError(f"the metric {name!r} is a {type(value).__name__}; expected a tensor or a number.")
        rows = len(self._micro_batches[index].rows)
        if value.dim() > 0 and len(value) != rows:
            raise LossError(
                f"the metric {name!r} has shape {tuple(value.shape)} for a micro-batch of {rows} rows; expected a 0-d "
                "tensor (combined as a weighted mean) or one entry per row in dim 0 (concatenated)."
            )
        return value.detach()

    def _combine(self, name: str, values: dict[int, Tensor]) -> Tensor:
        ordered = [values[index] for index in sorted(values)]
        if ordered[0].dim() > 0:
            if len(values) != len(self._micro_batches):
                raise LossError(f"the metric {name!r} has rows, but only {len(values)} of the micro-batches gave it.")
            return torch.cat(ordered)
        shares = self._weights.of_metric(name)
        counted = {index: value for index, value in values.items() if shares.parts[index] > 0}
        return _mean(counted, shares) if counted else torch.tensor(math.nan, device=self._device)

    def _names_differ(self, index: int, terms: Mapping[str, Tensor]) -> LossError:
        return LossError(
            f"micro-batch {index} returned the loss terms {sorted(terms)}, others {sorted(self._losses)}. Return the "
            "same names every time; a term may be left out only where its weight is 0."
        )

    def _raise_non_finite(self, values: Mapping[tuple[str, int], float]) -> None:
        index, name = min((index, name) for (name, index), value in values.items() if not math.isfinite(value))
        rows, value = self._micro_batches[index].rows, values[name, index]
        raise NonFiniteLossError(
            f"the loss term {name!r} is {value} in micro-batch {index} of {len(self._micro_batches)} (rows "
            f"{rows.start} to {rows.stop - 1}). Look for means over nothing, log(0), overflow or a learning rate too "
            "high; a weight of 0 leaves a micro-batch out.",
            index,
            name,
            value,
        )


def _mean(values: Mapping[int, Tensor], shares: Shares) -> Tensor:
    """The weighted mean of 0-d tensors, at least one."""
    stack = torch.stack(list(values.values()))
    if not stack.dtype.is_floating_point or stack.dtype.itemsize < 4:
        stack = stack.to(torch.float32)
    total = math.fsum(shares.weights[index] for index in values)
    factors = [shares.weights[index] / total for index in values]
    return torch.dot(stack, torch.tensor(factors, dtype=stack.dtype, device=stack.device))
