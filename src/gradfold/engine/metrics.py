"""The metrics: numbers or values per row that `loss_fn` returned beside the loss, combined over the window."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gradfold.batch.split import MicroBatch
from gradfold.errors import LossError
from gradfold.weights import WindowWeights


class Metrics:
    """The metrics of a window's micro-batches, combined in the order of the micro-batches, not of their runs.

    Attributes:
        joined: the `sums` over all processes; rows stay with the process that has them.
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], weights: WindowWeights, device: torch.device) -> None:
        self._micro_batches = micro_batches
        self._weights = weights
        self._device = device
        self._values: dict[str, dict[int, Tensor]] = {}
        self.joined: Mapping[str, tuple[float, float]] = {}

    def add(self, index: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of micro-batch `index`."""
        for name, value in metrics.items():
            of_metric = self._values.setdefault(name, {})
            of_metric[index] = self._read(name, value, index)
            first = next(iter(of_metric.values()))
            if of_metric[index].dim() != first.dim() or of_metric[index].shape[1:] != first.shape[1:]:
                raise LossError(
                    f"the metric {name!r} has shape {tuple(of_metric[index].shape)} in micro-batch {index}, and "
                    f"{tuple(first.shape)} in another; expected the same but for the number of rows."
                )

    def carry_over(self, earlier: Metrics, places: Mapping[int, int]) -> None:
        """Take the metrics of micro-batches that were done under an earlier split; `places`: indices there, here."""
        for name, values in earlier._values.items():
            taken = {places[index]: value for index, value in values.items() if index in places}
            if taken:
                self._values[name] = taken

    @property
    def all_names(self) -> Collection[str]:
        """The names that came so far, on any rank."""
        return {*self._values, *self.joined}

    def close(self, terms: Collection[str]) -> dict[str, Tensor]:
        """Scalars as weighted means (NaN over nothing), rows in the batch's own order; detached, on their device.

        Raises:
            LossError: one of the loss terms has the name of a metric, or rows are missing.
        """
        for name in self._values:
            if name in terms:
                raise LossError(f"{name!r} is both a loss term and a metric: rename the metric.")
        combined = {name: self._combine(name, values) for name, values in self._values.items()}
        return combined | {name: self._mean_of_all(name) for name in self.joined}

    def _read(self, name: str, value: Any, index: int) -> Tensor:
        if isinstance(value, Real):
            return torch.tensor(float(value), dtype=torch.float64)
        if not isinstance(value, Tensor) or value.is_complex():
            kind = "complex tensor" if isinstance(value, Tensor) else type(value).__name__
            raise LossError(f"the metric {name!r} is a {kind}; expected a real tensor or a number.")
        rows = len(self._micro_batches[index].rows)
        if value.dim() > 0 and len(value) != rows:
            raise LossError(
                f"the metric {name!r} has shape {tuple(value.shape)} for a micro-batch of {rows} rows; expected a 0-d "
                "tensor (combined as a weighted mean) or one entry per row in dim 0 (concatenated)."
            )
        return value.detach()

    def sums(self) -> dict[str, tuple[float, float]]:
        """By scalar metric, the sum of its values times their parts of the window, and that of the parts."""
        return {name: self._sum(name, values) for name, values in self._values.items() if _is_scalar(values)}

    def _sum(self, name: str, values: Mapping[int, Tensor]) -> tuple[float, float]:
        parts = self._weights.of_metric(name).normalized
        counted = [(value, parts[index]) for index, value in values.items() if parts[index]]
        return math.fsum(float(value) * part for value, part in counted), math.fsum(part for _, part in counted)

    def _mean_of_all(self, name: str) -> Tensor:
        value, total = self.joined[name]
        divisor = 1.0 if total and self._weights.of_metric(name).adds_up else total
        return torch.tensor(value / divisor if divisor else math.nan, dtype=torch.float64, device=self._device)

    def _combine(self, name: str, values: Mapping[int, Tensor]) -> Tensor:
        if _is_scalar(values):
            return self._mean(name, values)
        if len(values) != len(self._micro_batches):
            raise LossError(
                f"the metric {name!r} has rows, but only {len(values)} of {len(self._micro_batches)} micro-batches "
                "returned it."
            )
        in_turn = torch.cat([values[index] for index in sorted(values)])
        rows = [self._micro_batches[index].rows for index in sorted(values)]
        if all(isinstance(own, range) for own in rows):
            return in_turn  # one after another, as a split by rows leaves them
        order = torch.tensor([row for own in rows for row in own]).argsort()
        return in_turn.index_select(0, order.to(in_turn.device, non_blocking=True))

    def _mean(self, name: str, values: Mapping[int, Tensor]) -> Tensor:
        weights = self._weights.of_metric(name)
        parts = weights.normalized
        counted = {index: value for index, value in values.items() if parts[index]}
        if not counted:
            return torch.tensor(math.nan, device=self._device)
        if len(counted) == 1:
            (value,) = counted.values()
            is_wide = value.dtype.is_floating_point and value.dtype.itemsize >= 4
            return value.to(value.dtype if is_wide else torch.float32, copy=True)
        stack = torch.stack(list(counted.values()))
        if not stack.dtype.is_floating_point or stack.dtype.itemsize < 4:
            stack = stack.to(torch.float32)
        # Below 1 where a micro-batch did not give the metric.
        total = 1.0 if weights.adds_up else math.fsum(parts[index] for index in counted)
        factors = [parts[index] / total for index in counted]
        return torch.dot(stack, torch.tensor(factors, dtype=stack.dtype, device=stack.device))


def _is_scalar(values: Mapping[int, Tensor]) -> bool:
    return next(iter(values.values())).dim() == 0
