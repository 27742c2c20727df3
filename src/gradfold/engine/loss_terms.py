"""The loss terms: one or several that `loss_fn` returned for each micro-batch, and their means over the window."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradfold.batch.split import MicroBatch
from gradfold.engine.metrics import Metrics
from gradfold.errors import LossError, NonFiniteLossError, OptionError
from gradfold.weights import UNNAMED, WindowWeights

Loss: TypeAlias = "Tensor | Mapping[str, Tensor]"
LossOutput: TypeAlias = "Loss | tuple[Loss, Mapping[str, Any]]"
LossFn: TypeAlias = Callable[[Any, Any], LossOutput]


_TO_WRITE = """ Write
    def loss_fn(model, batch):
        inputs, targets = batch
        return criterion(model(inputs), targets)"""


def check_loss_fn(function: Any, call: str = "loss_fn(model, batch)") -> None:
    """Raise OptionError unless a function can be called so, and with a model; a criterion takes two tensors."""
    name = call.partition("(")[0]
    if not callable(function):
        raise OptionError(f"{name} is a {type(function).__name__}; expected a callable.")
    is_module = isinstance(function, nn.Module) and type(function).__call__ is nn.Module.__call__
    try:
        # A decorator may add the model to what it wraps.
        signature = inspect.signature(function.forward if is_module else function, follow_wrapped=False)
    except (TypeError, ValueError):  # a builtin has none
        return
    try:
        signature.bind(None, None)
        is_criterion = next(iter(signature.parameters.values())).annotation in (Tensor, "Tensor", "torch.Tensor")
    except TypeError:
        is_criterion = True
    if is_criterion:
        own = getattr(function, "__name__", type(function).__name__)
        raise OptionError(
            f"{name} is {own}({', '.join(signature.parameters)}); expected a function of two arguments, called as "
            f"{call}.{_TO_WRITE if name == 'loss_fn' else ''}"
        )


def read_pair(output: LossOutput) -> tuple[Loss, Mapping[str, Any]]:
    """The loss and the metrics of an output; LossError where it does not have both."""
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping):
        return output
    raise LossError(_not_a_loss(output))


def read_terms(loss: Loss) -> dict[str, Tensor]:
    """The terms of a loss by name; LossError where it is not a loss, or a term not a 0-d floating point tensor."""
    terms = {UNNAMED: loss} if isinstance(loss, Tensor) else loss
    if not isinstance(terms, Mapping) or not terms or not all(isinstance(term, Tensor) for term in terms.values()):
        raise LossError(_not_a_loss(loss))
    for name, term in terms.items():
        if term.dim() or not term.is_floating_point():
            if terms is loss and "loss" in terms:  # of transformers, a mapping with the logits in it
                raise LossError(_not_a_loss(loss))
            raise LossError(
                f"the loss term {name!r} has shape {tuple(term.shape)} and dtype {term.dtype}; expected a 0-d floating "
                "point tensor, the mean over the micro-batch: use reduction='mean', or write loss.mean()."
            )
    return dict(terms)


def loss_terms_of(output: LossOutput) -> dict[str, Tensor]:
    """The terms of what `loss_fn` returned, with or without metrics."""
    return read_terms(read_pair(output)[0] if isinstance(output, tuple) else output)


def _read(values: Sequence[Tensor | float], device: torch.device) -> Sequence[float]:
    """Kept values as numbers, in one transfer."""
    if set(map(type, values)) <= {float}:  # the usual case on the host, faster
        return values  # type: ignore[return-value]
    # A model on several devices may have its terms on them.
    waiting = [value.to(device) for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(waiting).tolist() if len(waiting) > 1 else map(Tensor.item, waiting))
    return [next(read) if isinstance(value, Tensor) else value for value in values]


def _not_a_loss(output: object) -> str:
    has_loss = hasattr(output, "loss") or (isinstance(output, Mapping) and "loss" in output)
    hint = " Return output.loss (or output['loss'])." if has_loss else ""
    return (
        f"loss_fn returned a {type(output).__name__}; expected a 0-d tensor (a mean), a dict of them by term, or a "
        f"pair of such a loss and a dict of metrics.{hint}"
    )


@dataclass(frozen=True)
class TermSums:
    """By term, the weighted sum of losses; their dtype, None where there are no terms; and `Metrics.sums`."""

    values: Mapping[str, float]
    dtype: torch.dtype | None
    metrics: Mapping[str, tuple[float, float]]


class LossTerms:
    """The loss terms of a window's micro-batches, with metrics beside them, and their means over the window.

    With `gives_all` terms of weight 0 are given out as well, for ranks that have to back-propagate the same.

    Attributes:
        normalized: by name of a term, the normalized weight of each micro-batch; empty before the first.
        sums: by name, the sum of weighted losses, once settled.
    """

    def __init__(
        self,
        micro_batches: Sequence[MicroBatch],
        weights: WindowWeights,
        device: torch.device,
        gives_all: bool = False,
    ) -> None:
        self._micro_batches = micro_batches
        self._gives_all = gives_all
        self._weights = weights
        self._device = device
        self.normalized: dict[str, tuple[float, ...]] = {}
        self._of_unnamed: tuple[float, ...] | None = None  # of a loss that is not a dict of terms
        self._values: dict[tuple[str, int], Tensor | float] = {}  # term, micro-batch -> what keep() made of the loss
        self._dtype: torch.dtype | None = None  # of the first loss
        self._taken: list[int] = []  # micro-batches so far
        self.sums: dict[str, float] = {}
        self._joined: TermSums | None = None  # where several processes train together: the sums over all
        self._metrics: Metrics | None = None

    @property
    def metrics(self) -> Metrics:
        """What `loss_fn` returned beside the loss."""
        if self._metrics is None:
            self._metrics = Metrics(self._micro_batches, self._weights, self._device)
        return self._metrics

    @property
    def all_names(self) -> set[str]:
        """The names of the terms of all ranks, once settled."""
        return {*self.normalized, *self.sums}

    def add(self, index: int, loss: Loss) -> list[tuple[Tensor, float]]:
        """Take the loss of micro-batch `index`.

        Returns:
            The terms of positive weight, each with its normalized weight. The others are left out, not multiplied by
            0: a mean over nothing is NaN, and NaN x 0 is NaN.

        Raises:
            LossError: it is not a loss, a term is not a 0-d floating point tensor, or the names differ.
        """
        if isinstance(loss, Tensor):
            if not self.normalized and self._weights.unnamed is not None:
                self._of_unnamed = self.normalized[UNNAMED] = self._weights.unnamed.normalized
            weight = 0.0 if self._of_unnamed is None else self._of_unnamed[index]
            if weight and loss.dim() == 0 and loss.is_floating_point():  # the usual case, faster
                self._taken.append(index)
                self._dtype = self._dtype or loss.dtype
                # Where reading it would wait for a device, a tensor without the graph.
                self._values[UNNAMED, index] = loss.item() if loss.is_cpu else loss.detach()
                return [(loss, weight)]
        terms = read_terms(loss)
        if terms.keys() != self.normalized.keys():
            self._check_names(index, terms)
        self._taken.append(index)
        self._dtype = self._dtype or next(iter(terms.values())).dtype
        weighed = []
        for name, term in terms.items():
            weight = self.normalized[name][index]
            if weight or self._gives_all:
                weighed.append((term, weight))
            if weight:
                self._values[name, index] = term.item() if term.is_cpu else term.detach()
        return weighed

    def carry_over(self, earlier: LossTerms, places: Mapping[int, int]) -> None:
        """Take the losses of micro-batches that were done under an earlier split; `places`: their indices there, here.

        The names of the terms are known from there, too.
        """
        self.normalized = {name: self._weights.of_term(name).normalized for name in earlier.normalized}
        self._of_unnamed = self.normalized.get(UNNAMED) if len(self.normalized) == 1 else None
        self._dtype = earlier._dtype
        self._taken = [places[index] for index in earlier._taken if index in places]
        self._values = {
            (name, places[index]): value for (name, index), value in earlier._values.items() if index in places
        }
        if earlier._metrics is not None:
            self.metrics.carry_over(earlier._metrics, places)

    def settle(self, flags: Sequence[Tensor] = ()) -> bool:
        """Every micro-batch is done: read losses and flags from the device in one transfer.

        Gives whether the loss is finite and every flag is 0.
        """
        seen = [flag.item() if flag.is_cpu else flag for flag in flags]
        values = _read([*self._values.values(), *seen], self._device)
        sums: dict[str, float] = {}
        for (name, index), value in zip(self._values, values, strict=False):
            sums[name] = sums.get(name, 0.0) + self.normalized[name][index] * value
        self._values = dict(zip(self._values, values, strict=False))
        self.sums = sums
        if self._joined is not None:
            self.sums = dict(self._joined.values)
        return math.isfinite(sum(self.sums.values())) and not any(values[len(self._values) :])

    def own_sums(self) -> TermSums:
        """The sums of these micro-batches, once settled."""
        return TermSums(self.sums, self._dtype, self.metrics.sums())

    def join(self, sums: TermSums) -> None:
        """Take the sums over all processes, to be the loss when it is settled again."""
        self._joined = sums
        self._dtype = self._dtype or sums.dtype
        self.metrics.joined = sums.metrics

    def close(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the settled window, and by name the mean of each term and the metrics.

        Losses are 0-d, detached, on the device, and averaged in float64. NaN where all weights are 0; a term of weight
        0 adds nothing to the loss.
        """
        loss = self._scalar(sum(self.sums.values()), self._dtype) if self.sums else self._scalar(math.nan, None)
        means: dict[str, Tensor] = {}
        if self._of_unnamed is None and self.sums:
            for name in {**self.normalized, **self.sums}:
                if name != UNNAMED:
                    means[name] = self._scalar(self.sums.get(name, math.nan), self._dtype)
        if self._metrics is not None:
            means |= self._metrics.close(self.all_names)
        return loss, means

    def non_finite(self) -> set[int]:
        """The micro-batches of a settled window whose loss is NaN or infinite."""
        return {index for (_, index), value in self._values.items() if not math.isfinite(value)}

    def refuse_non_finite(self, offender: int | None = None) -> None:
        """Raise NonFiniteLossError where the loss of a settled window is not finite.

        Args:
            offender: the micro-batch to name; None names the first whose loss is not finite.
        """
        for (name, index), value in self._values.items():
            if not math.isfinite(value) and offender in (None, index):
                part = self._micro_batches[index]
                raise NonFiniteLossError(
                    f"the loss term {name!r} is {float(value)} in micro-batch {index} of {len(self._micro_batches)}"
                    f"{part.where}. Look for means over nothing, log(0), overflow or a learning rate too high; a "
                    "weight of 0 leaves a micro-batch out.",
                    index,
                    name,
                    float(value),
                )
        if not math.isfinite(sum(self.sums.values())):
            if self._joined is not None:
                raise NonFiniteLossError(
                    "the loss of another rank is not finite; the error of that rank says where.", 0, UNNAMED, math.nan
                )
            raise NonFiniteLossError("the finite loss terms sum to more than a float holds.", 0, UNNAMED, math.inf)

    def _scalar(self, value: float, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or torch.float32
        return torch.full((), value, dtype=dtype if dtype.itemsize >= 4 else torch.float32, device=self._device)

    def _check_names(self, index: int, terms: Mapping[str, Tensor]) -> None:
        """A term may be left out of a micro-batch only where its weight is 0, in whatever order they come."""
        new = {name: self._weights.of_term(name).normalized for name in terms if name not in self.normalized}
        if self._taken:
            late = [name for name, parts in new.items() if any(parts[taken] for taken in self._taken)]
            missing = [name for name, parts in self.normalized.items() if name not in terms and parts[index]]
            if late or missing:
                raise LossError(
                    f"micro-batch {index} returned the loss terms {sorted(terms)}, others {sorted(self.normalized)}. "
                    "Return the same names every time; a term may be left out only where its weight is 0."
                )
        self.normalized.update(new)
        self._of_unnamed = self.normalized.get(UNNAMED) if len(self.normalized) == 1 else None
