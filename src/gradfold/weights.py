"""A weight: how much a micro-batch counts in the mean over its window.

Every loss term and metric is a mean over something: samples, tokens, pixels. The weight of a micro-batch is the number
of those things in it. The weights of a window sum to the one denominator of the term, known before the first backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from gradfold.batch.split import MicroBatch
from gradfold.errors import WeightError

__all__ = ["TokenCount", "token_count"]

BARE = "loss"  # the name of a loss that is not a dict of terms

Weight: TypeAlias = "Literal['samples'] | Callable[[Any], float | Tensor]"
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
                raise WeightError(f"{self._name()}: the labels are 0-d, so none is the first of its row to leave out.")
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


@dataclass(frozen=True, slots=True)
class Shares:
    """The weights of a window's micro-batches under one name.

    Attributes:
        total: the sum of the weights, the denominator.
        parts: what each micro-batch makes up of the window's mean; all 0 in a window that weighs nothing.
        idle: the micro-batches that weigh nothing.
        weights: of the micro-batches.
    """

    total: float
    parts: tuple[float, ...]
    idle: frozenset[int]
    weights: tuple[float, ...]


@lru_cache(maxsize=64)  # windows of equal shape have equal shares
def shares_of(weights: tuple[float, ...], of_total: float | None = None) -> Shares:
    """The shares that these weights, one per micro-batch, give; of their own sum, or of a larger total."""
    try:
        total = math.fsum(weights) if of_total is None else of_total
    except OverflowError:
        raise WeightError(f"the weights of the window sum to more than a float holds: {list(weights)}.") from None
    parts = tuple(weight / total if total else 0.0 for weight in weights)
    return Shares(total, parts, frozenset(index for index, weight in enumerate(weights) if weight == 0), weights)


class WindowWeights:
    """The shares of one window for every loss term and metric."""

    def __init__(self, shares: Shares | dict[str, Shares], samples: Shares) -> None:
        self.shares = shares
        self.samples = samples

    def arrive(self) -> None:
        """Wait for denominators that are summed over several processes; here they are known."""

    def own_totals(self) -> list[float]:
        """What these micro-batches weigh together under every name, and their samples."""
        named = self.shares.values() if isinstance(self.shares, dict) else [self.shares]
        return [math.fsum(shares.weights) for shares in (*named, self.samples)]

    def of_totals(self, totals: Sequence[float]) -> WindowWeights:
        """These weights as shares of larger totals, in the order of `own_totals()`."""
        *named, samples = totals
        own = self.shares if isinstance(self.shares, dict) else {"": self.shares}
        larger = {name: shares_of(one.weights, total) for (name, one), total in zip(own.items(), named, strict=True)}
        return WindowWeights(
            larger if isinstance(self.shares, dict) else larger[""], shares_of(self.samples.weights, samples)
        )

    def of_term(self, name: str) -> Shares:
        """The shares of a loss term.

        Raises:
            WeightError: weights were given by name, and none for this one.
        """
        self.arrive()
        if not isinstance(self.shares, dict):
            return self.shares
        if name not in self.shares:
            raise WeightError(
                f"weight= names {sorted(self.shares)}, but loss_fn returned the loss term {name!r}, which has no "
                'weight. Give one per loss term (a bare loss is called "loss").'
            )
        return self.shares[name]

    def of_metric(self, name: str) -> Shares:
        """The shares of a metric: its own, else those of a bare loss, else samples."""
        self.arrive()
        if not isinstance(self.shares, dict):
            return self.shares
        return self.shares.get(name) or self.shares.get(BARE) or self.samples

    def total(self, terms: Collection[str] = ()) -> float | dict[str, float]:
        """The denominator, or one per loss term where weights were given by name."""
        self.arrive()
        if not isinstance(self.shares, dict):
            return self.shares.total
        return {name: shares.total for name, shares in self.shares.items() if name in terms or not terms}

    def names_at(self, index: int) -> list[str] | None:
        """The names that weigh something in a micro-batch; None where weights were not given by name."""
        if not isinstance(self.shares, dict):
            return None
        return [name for name, shares in self.shares.items() if shares.weights[index]]

    def idle(self) -> frozenset[int]:
        """The micro-batches that weigh nothing under every name."""
        if isinstance(self.shares, dict):
            return frozenset.intersection(*(shares.idle for shares in self.shares.values()))
        return self.shares.idle

    def check_names(self, terms: Collection[str], metrics: Collection[str]) -> None:
        """Raise WeightError where a weight was given for something that loss_fn did not return."""
        if not isinstance(self.shares, dict) or not terms:
            return
        unknown = [name for name in self.shares if name not in terms and name not in metrics]
        if unknown:
            raise WeightError(
                f"weight= names {sorted(self.shares)}, but loss_fn returned the loss terms {sorted(terms)} and the "
                f"metrics {sorted(metrics)}: the weight {unknown[0]!r} has no term or metric. Give one weight per loss "
                'term (a bare loss is called "loss").'
            )


def _is_samples(weight: object) -> bool:
    return isinstance(weight, str) and weight == "samples"


def counts_samples(weight: WeightOption) -> bool:
    """Whether samples are what some loss term or metric is a mean over."""
    return any(map(_is_samples, weight.values())) if isinstance(weight, Mapping) else _is_samples(weight)


def check_option(weight: WeightOption) -> None:
    """Raise WeightError unless this is a weight, or a dict of them."""
    every = weight.values() if isinstance(weight, Mapping) else [weight]
    for one in every:
        if not callable(one) and not _is_samples(one):
            raise WeightError(
                f'weight={one!r}; expected "samples", gradfold.token_count(...), a callable that takes a micro-batch '
                "and gives a number, or a dict of these by the name of the loss term or metric."
            )
    if not every:
        raise WeightError("weight={} is empty; give one weight per loss term.")


def weigh(weight: WeightOption, micro_batches: Sequence[MicroBatch]) -> WindowWeights:
    """Weigh all micro-batches of a window.

    Weights that are tensors on a device are read in one transfer each dtype: the only host synchronization here.

    Raises:
        WeightError: a weight is negative, not finite, or not a number.
    """
    samples = shares_of(tuple([len(part.rows) for part in micro_batches]))
    if _is_samples(weight):
        return WindowWeights(samples, samples)
    if not isinstance(weight, Mapping):
        return WindowWeights(_weigh_each([weight], micro_batches)[0], samples)
    asked = {name: one for name, one in weight.items() if not _is_samples(one)}
    found = dict(zip(asked, _weigh_each(list(asked.values()), micro_batches), strict=True))
    return WindowWeights({name: found.get(name, samples) for name in weight}, samples)


def _weigh_each(weights: Sequence[Any], micro_batches: Sequence[MicroBatch]) -> list[Shares]:
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
    return [shares_of(tuple(numbers[start : start + size])) for start in range(0, len(numbers), size)]


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
                f"the weight function gave a {type(value).__name__}{shape}; expected one number (int, float or 0-d "
                "tensor), for example mask.sum()."
            ) from None
    for positions in stacks.values():
        read = torch.stack([values[position].detach().reshape(()) for position in positions]).tolist()
        for position, number in zip(positions, read, strict=True):
            numbers[position] = float(number)
    return numbers
