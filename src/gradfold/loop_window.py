"""A loop window: the micro-batches of one update, for a loop body that runs the forward passes by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from torch import Tensor, nn

from gradfold.agreement import Alone, Together
from gradfold.backward import BackPropagation, BackwardFn
from gradfold.batch import rows_if_any
from gradfold.coupled.batch_norm import BatchNormOption, WindowStatistics, batch_statistics_layers, refuse
from gradfold.errors import LossError, WeightError, WindowError
from gradfold.gradients import SetAside
from gradfold.loss import LossTerms
from gradfold.metric import Metrics
from gradfold.split import MicroBatch
from gradfold.sync import without_reductions
from gradfold.weight import BARE, Weight, WindowWeights

__all__ = ["LoopWindow"]

T = TypeVar("T")


class LoopWindow(Generic[T]):
    """The micro-batches of one update, for a loop body that stays as it was but for `window.backward(loss)`.

    Iterate over it once. The weights of all micro-batches are known before the first, so every gradient is seeded with
    its exact share. Nothing is rolled back if the loop body fails.
    """

    def __init__(
        self,
        model: nn.Module,
        micro_batches: list[T],
        weight: Weight,
        batch_norm: BatchNormOption,
        backward: BackwardFn | None,
        agreement: Alone,
    ) -> None:
        rows = [_count_rows(part) if weight == "samples" else 0 for part in micro_batches]
        stops = [sum(rows[: index + 1]) for index in range(len(rows))]
        self._parts = [
            MicroBatch(data, range(stop - count, stop))
            for data, count, stop in zip(micro_batches, rows, stops, strict=True)
        ]
        self._agreement = agreement
        self._model = model
        self._weights: WindowWeights = self._agreement.weigh(self._parts)
        device = next(model.parameters()).device
        self._losses = LossTerms(self._parts, self._weights, device)
        self._metrics = Metrics(self._parts, self._weights, device)
        self._back_propagate = BackPropagation(backward)
        layers = batch_statistics_layers(model) if len(micro_batches) > 1 else {}
        if layers and batch_norm is None:
            refuse(layers, len(micro_batches), stops[-1])
        self._statistics = WindowStatistics(layers)
        self._current: int | None = None
        self._done: set[int] = set()
        self._loss: Tensor | None = None
        self._is_started = False

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[T]:
        """The micro-batches, as the loader gave them.

        Raises:
            WindowError: the window was iterated before, or a micro-batch ended without `window.backward(loss)`.
        """
        if self._is_started:
            raise WindowError("this window was iterated before; one pass over a window is one update.")
        self._is_started = True
        try:
            with self._statistics:
                with self._as_one():
                    for index, part in enumerate(self._parts):
                        self._current = index
                        self._statistics.listen()
                        yield part.data
                        self._check_backward(index)
                if not self._losses.settle():
                    self._losses.refuse_non_finite()
                loss, _ = self._losses.close()
                self._statistics.commit()
        finally:
            self._current = None
        self._loss = loss

    def backward(self, loss: Tensor) -> None:
        """Back-propagate the loss of the current micro-batch with its share of the window: was `(loss / n).backward()`.

        Args:
            loss: 0-d, the mean over the micro-batch. Several losses of one micro-batch: add them up first.

        Raises:
            WindowError: there is no current micro-batch, or it had its backward already.
            LossError: the loss is not 0-d, or does not require grad.
        """
        if self._current is None:
            raise WindowError(
                "window.backward(loss) belongs inside the loop over the window: for micro_batch in window: ..."
            )
        if self._current in self._done:
            raise WindowError(
                f"micro-batch {self._current} had its window.backward(loss) already; add up its losses first."
            )
        if not isinstance(loss, Tensor):
            raise LossError(f"window.backward takes the loss, one 0-d tensor; got a {type(loss).__name__}.")
        weighed = self._losses.add(self._current, loss)
        self._done.add(self._current)
        self._statistics.pause()
        self._back_propagate(weighed)

    @property
    def loss(self) -> Tensor:
        """The weighted mean of the losses, 0-d, detached; NaN where the window weighs nothing.

        Raises:
            WindowError: the loop over the window is not finished.
        """
        if self._loss is None:
            raise WindowError("window.loss is known after the loop over the window, not inside it.")
        return self._loss

    @property
    def weight(self) -> float:
        """The denominator: what the micro-batches weigh together."""
        return self._weights.of_term(BARE).total

    @property
    def is_unfinished(self) -> bool:
        """Whether a loop over the window began and did not reach its end."""
        return self._is_started and self._loss is None

    @contextmanager
    def _as_one(self) -> Iterator[None]:
        """Several processes accumulate by themselves, and sum their gradients at the end."""
        if not isinstance(self._agreement, Together):
            yield
            return
        modules = list(self._model.modules())
        gradients = SetAside(list(self._model.parameters()))
        try:
            with self._agreement, without_reductions(modules):
                yield
                self._agreement.end(self._losses, self._metrics, gradients)
                gradients.settle()
                self._agreement.conclude()
        except BaseException:
            gradients.put_back(self._model.parameters())
            raise
        gradients.add_back()

    def _check_backward(self, index: int) -> None:
        if index not in self._done and self._weights.of_term(BARE).parts[index] > 0:
            raise WindowError(
                f"micro-batch {index} of {len(self._parts)} ended without window.backward(loss), but its weight is in "
                "the denominator. To leave a micro-batch out, filter the loader or give it weight 0."
            )


def _count_rows(micro_batch: object) -> int:
    rows = rows_if_any(micro_batch)
    if rows is None:
        raise WeightError(
            f"the rows of a {type(micro_batch).__name__} cannot be counted. Give windows() a weight, "
            'for example weight=lambda batch: len(batch["labels"]).'
        )
    return rows
