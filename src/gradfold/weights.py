"""A weight: how much a micro-batch counts in the mean over its window.

Every loss term and metric is a mean over something: samples, tokens, pixels. The weight of a micro-batch is the number
of those things in it. The weights of a window sum to the one denominator of the term, known before the first backward.
With weight "sum" there is no denominator: the losses of micro-batches are shares of that of the batch, and add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from gradfold.batch.split import MicroBatch
from gradfold.errors import WeightError

__all__ = ["TokenCount", "token_count"]

UNNAMED = "loss"  # the name of a loss that is not a dict of terms

Weight: TypeAlias = "Literal['samples', 'sum'] | Callable[[Any], float | Tensor]"
WeightOption: TypeAlias = "Weight | Mapping[str, Weight]"


@dataclass(frozen=True)
class TokenCount:
    """The weight that `token_count` makes; see there."""

    labels: str | int | Callable[[Any], Tensor]
    ignore_index: int
    shift: bool

    def __call__(self, micro_batch: Any) -> Tensor:
        """The number of valid labels of a micro-batch, 0-d, on the device of the labels."""
        labels = self._find(micro_batch)
        if not isinstance(labels, Tensor):
            raise WeightError(f"{self._name()}: the labels are a {type(labels).__name__}, expected a tensor.")
        if self.shift:
            if labels.dim() == 0:
                raise WeightError(f"{self._name()}: the labels are 0-d, so no row has a first label to leave out.")
            labels = labels[..., 1:]
        return (labels != self.ignore_index).sum()

    def _find(self, micro_batch: Any) -> Any:
        if callable(self.labels):
            return self.labels(micro_batch)
        if isinstance(micro_batch, Tensor):
            raise WeightError(
                f"{self._name()}: the micro-batch is one Tensor, so {self.labels!r} would be one of its rows. Give a "
                "callable that takes the micro-batch, for example lambda batch: batch."
            )
        try:
            if isinstance(self.labels, str) and not isinstance(micro_batch, Mapping):
                return getattr(micro_batch, self.labels)
            return micro_batch[self.labels]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise WeightError(
                f"{self._name()}: no labels there; the micro-batch is {_contents(micro_batch)}. Give the key or "
                "index of the labels, or a callable that takes the micro-batch."
            ) from error

    def _name(self) -> str:
        return f"token_count({self.labels!r})"


def _contents(micro_batch: object) -> str:
    name = f"a {type(micro_batch).__name__}"
    if isinstance(micro_batch, Mapping):
        return f"{name} with the keys {sorted(map(str, micro_batch))}"
    if isinstance(micro_batch, (tuple, list)):
        return f"{name} with the indices 0 to {len(micro_batch) - 1}"
    return name


def token_count(
    labels: str | int | Callable[[Any], Tensor], *, ignore_index: int = -100, shift: bool = False
) -> TokenCount:
    """A weight: the number of labels that the loss counts, for losses averaged over tokens (or pixels).

    Args:
        labels: where the labels are in a micro-batch: a key, an index, or a callable that takes the micro-batch.
            Labels may have any shape.
        ignore_index: the label that the loss ignores, as in `torch.nn.functional.cross_entropy`.
        shift: leave out the first label of each row (last dim), as causal language models do when they predict
            label t + 1 from position t.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html (`ignore_index`, "mean").

    >>> import torch, gradfold
    >>> weight = gradfold.token_count("labels")
    >>> weight({"labels": torch.tensor([[5, 7, -100], [2, -100, -100]])})
    tensor(3)
    >>> gradfold.token_count(1, shift=True)((None, torch.tensor([[5, 7, -100], [2, -100, -100]])))
    tensor(1)
    """
    return TokenCount(labels, ignore_index, shift)


@dataclass(frozen=True)
class Weights:
    """The weights of a window's micro-batches under one name.

    Where losses add up, each weighs 1 (0 without rows), and so does the window, however many micro-batches it has.
    """

    values: tuple[float, ...]
    read_total: Callable[[], float]  # called when it is first needed, since other ranks may have to be waited for
    adds_up: bool = False

    @cached_property
    def total(self) -> float:
        """The denominator: the sum of the weights, of all ranks."""
        return self.read_total()

    @property
    def own_total(self) -> float:
        """What these micro-batches are of the denominator."""
        return float(any(self.values)) if self.adds_up else math.fsum(self.values)

    def over(self, read: Callable[[], float]) -> Weights:
        """These weights with the sum of the `own_total`s of all ranks, read when first needed."""
        return Weights(self.values, (lambda: min(read(), 1.0)) if self.adds_up else read, self.adds_up)

    @cached_property
    def normalized(self) -> tuple[float, ...]:
        """The part of the window's mean that each micro-batch is; all 0 in a window of weight 0."""
        return tuple(value / self.total if self.total else 0.0 for value in self.values)

    @cached_property
    def zero_weight(self) -> frozenset[int]:
        """The micro-batches of weight 0."""
        return frozenset(index for index, value in enumerate(self.values) if value == 0)


@lru_cache(maxsize=64)  # windows of equal shape have equal weights
def normalize(values: tuple[float, ...]) -> Weights:
    """Weights, one per micro-batch, normalized by their own sum."""
    try:
        total = math.fsum(values)
    except OverflowError:
        raise WeightError(f"the sum of micro-batch weights overflows float64: {list(values)}.") from None
    return Weights(values, lambda: total)


class WindowWeights:
    """The weights of one window, for every loss term and metric.

    Attributes:
        named: by the name of a loss term or metric; empty where one weight counts for all.
        unnamed: that weight; None where weights have names.
        samples: the numbers of rows.
        zero_weight: the micro-batches of weight 0 under every name.
    """

    def __init__(self, named: Mapping[str, Weights], unnamed: Weights | None, samples: Weights) -> None:
        self.named = named
        self.unnamed = unnamed
        self.samples = samples
        self._every = list(named.values()) if unnamed is None else [unnamed]
        self.zero_weight = frozenset.intersection(*(one.zero_weight for one in self._every))

    def wait(self) -> None:
        """Wait for denominators that are summed over several processes."""
        self.samples.total  # noqa: B018  # reads them

    def are_busy(self) -> bool:
        """Whether a micro-batch of any rank has a positive weight."""
        return any(one.total > 0 for one in self._every)

    def own_totals(self) -> list[float]:
        """The sum of the weights of these micro-batches under every name, and of their samples."""
        return [one.own_total for one in (*self._every, self.samples)]

    def over(self, read: Callable[[], Sequence[float]]) -> WindowWeights:
        """These weights normalized by larger denominators in the order of `own_totals()`, read when first needed."""
        *larger, samples = (
            one.over(partial(lambda index: read()[index], index))
            for index, one in enumerate((*self._every, self.samples))
        )
        named = dict(zip(self.named, larger, strict=False))  # none where one weight counts for all
        return WindowWeights(named, None if self.named else larger[0], samples)

    def of_term(self, name: str) -> Weights:
        """The weights of a loss term; raises WeightError where weights were given by name, and none for this one."""
        found = self.unnamed or self.named.get(name)
        if found is None:
            raise WeightError(
                f"weight= names {sorted(self.named)}, but loss_fn returned the loss term {name!r}, which has no "
                'weight. Give one per loss term (an unnamed loss is called "loss").'
            )
        return found

    def of_metric(self, name: str) -> Weights:
        """The weights of a metric: its own, else those of an unnamed loss, else samples.

        A metric is a mean over samples beside a loss that adds up, unless it was said by name that it does, too.
        """
        of_loss = self.unnamed or self.named.get(UNNAMED)
        shared = self.samples if of_loss is None or of_loss.adds_up else of_loss
        return self.named.get(name) or shared

    def total(self, terms: Collection[str] = ()) -> float | dict[str, float]:
        """The denominator, or one per loss term where weights were given by name."""
        if self.unnamed is not None:
            return self.unnamed.total
        return {name: one.total for name, one in self.named.items() if name in terms or not terms}

    def names_at(self, index: int) -> list[str] | None:
        """The names under which a micro-batch has a positive weight; None where weights have no names."""
        return [name for name, one in self.named.items() if one.values[index]] if self.named else None

    def check_names(self, terms: Collection[str], metrics: Collection[str]) -> None:
        """Raise WeightError where a weight was given for something that loss_fn did not return."""
        unknown = [name for name in self.named if name not in terms and name not in metrics]
        if unknown and terms:
            raise WeightError(
                f"weight= names {sorted(self.named)}, but loss_fn returned the loss terms {sorted(terms)} and the "
                f"metrics {sorted(metrics)}: the weight {unknown[0]!r} has no term or metric. Give one weight per loss "
                'term (an unnamed loss is called "loss").'
            )


@lru_cache(maxsize=64)
def sample_weights(num_rows: tuple[int, ...]) -> WindowWeights:
    """The weights of micro-batches with these numbers of rows, where samples are what counts."""
    samples = normalize(num_rows)
    return WindowWeights({}, samples, samples)


@lru_cache(maxsize=64)
def sum_weights(num_rows: tuple[int, ...]) -> WindowWeights:
    """The weights of micro-batches with these numbers of rows, whose losses add up."""
    values = tuple(float(num > 0) for num in num_rows)
    total = float(any(values))
    return WindowWeights({}, Weights(values, lambda: total, adds_up=True), normalize(num_rows))


def _is_samples(weight: object) -> bool:
    return isinstance(weight, str) and weight == "samples"


def is_sum(weight: object) -> bool:
    """Whether losses add up."""
    return isinstance(weight, str) and weight == "sum"


def counts_samples(weight: WeightOption) -> bool:
    """Whether samples are what some loss term or metric is a mean over."""
    return any(map(_is_samples, weight.values())) if isinstance(weight, Mapping) else _is_samples(weight)


def check_option(weight: WeightOption) -> None:
    """Raise WeightError unless this is a weight, or a dict of them."""
    every = weight.values() if isinstance(weight, Mapping) else [weight]
    for one in every:
        if not callable(one) and not _is_samples(one) and not is_sum(one):
            raise WeightError(
                f'weight={one!r}; expected "samples", gradfold.token_count(...), "sum", a callable that takes a '
                "micro-batch and returns a number, or a dict of these by the name of the loss term or metric."
            )
    if not every:
        raise WeightError("weight={} is empty; give one weight per loss term.")


def weigh(weight: WeightOption, micro_batches: Sequence[MicroBatch]) -> WindowWeights:
    """Weigh all micro-batches of a window.

    Weights that are tensors on a device are read in one transfer each dtype: the only host synchronization here.

    Raises:
        WeightError: a weight is negative, not finite, or not a number.
    """
    num_rows = tuple(len(part.rows) for part in micro_batches)
    if _is_samples(weight):
        return sample_weights(num_rows)
    if is_sum(weight):
        return sum_weights(num_rows)
    samples = normalize(num_rows)
    if not isinstance(weight, Mapping):
        return WindowWeights({}, _weigh_each([weight], micro_batches)[0], samples)
    asked = {name: one for name, one in weight.items() if callable(one)}
    found = dict(zip(asked, _weigh_each(list(asked.values()), micro_batches), strict=True))
    sums = sum_weights(num_rows).of_term(UNNAMED)
    known = {name: sums if is_sum(one) else found.get(name, samples) for name, one in weight.items()}
    return WindowWeights(known, None, samples)


def _weigh_each(weights: Sequence[Any], micro_batches: Sequence[MicroBatch]) -> list[Weights]:
    values = [weight(part.data) for weight in weights for part in micro_batches]
    numbers = _read(values)
    for position, (value, number) in enumerate(zip(values, numbers, strict=True)):
        if not math.isfinite(number) or number < 0:
            index = position % len(micro_batches)
            raise WeightError(
                f"the weight of micro-batch {index}{micro_batches[index].where} is {value!r}; expected a finite number "
                "of at least 0."
            )
    size = len(micro_batches)
    return [normalize(tuple(numbers[index * size : (index + 1) * size])) for index in range(len(weights))]


def _read(values: Sequence[Any]) -> list[float]:
    """The values as floats; device tensors are stacked first, so that one transfer reads all of one dtype."""
    numbers = [math.nan] * len(values)
    stacks: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for position, value in enumerate(values):
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            stacks.setdefault((value.device, value.dtype), []).append(position)
            continue
        try:
            if isinstance(value, (Tensor, str, bytes, bytearray)):
                raise TypeError
            numbers[position] = float(value)
        except (TypeError, ValueError, OverflowError):
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise WeightError(
                f"the weight function returned a {type(value).__name__}{shape}; expected one number (int, float or 0-d "
                "tensor), for example mask.sum()."
            ) from None
    for positions in stacks.values():
        read = torch.stack([values[position].detach().reshape(()) for position in positions]).tolist()
        for position, number in zip(positions, read, strict=True):
            numbers[position] = float(number)
    return numbers
