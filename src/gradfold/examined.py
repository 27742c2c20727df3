"""What is examined: a micro-batch, its two parts and their weights; and the ways in which nothing comes of it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from gradfold.batch import Batch
from gradfold.trial import Shares
from gradfold.weight import WeightOption

__all__: list[str] = []


class CannotKnowError(Exception):
    """Nothing can be said about this loss, for the reason in the message. Internal: it ends in a warning."""


class UndecidedError(Exception):
    """These rows do not tell; others may. Internal."""


@dataclass(frozen=True)
class Examined:
    """A micro-batch and its two parts, on the device, with their weights.

    Attributes:
        whole, parts: what `loss_fn` takes.
        recollated: the parts as a collate function makes them, with a padding of their own; used where no random
            numbers are drawn, which could not be handed to rows of another length.
        rows: of each part, counted from the start of the micro-batch.
        shares: by loss term, what the micro-batch makes up of its window: its seed.
        part_shares: by loss term, what each part makes up of the micro-batch.
        weights_of: by loss term, the weight of the micro-batch and those of the parts together.
        weight: the option as the user gave it.
    """

    whole: Batch
    parts: tuple[Batch, Batch]
    recollated: tuple[Batch, Batch] | None
    rows: tuple[range, range]
    shares: Shares
    part_shares: tuple[Shares, Shares]
    weights_of: Callable[[str], tuple[float, float]]
    weight: WeightOption

    def seeds_of(self, index: int) -> Shares:
        """By loss term, the seed of part `index`: what it makes up of the window."""
        return lambda name: self.shares(name) * self.part_shares[index](name)

    def seen(self, names: Collection[str]) -> tuple[str, ...]:
        """The loss terms of these that weigh something in both parts."""
        seeds = self.seeds_of(0), self.seeds_of(1)
        return tuple(name for name in names if all(seed(name) for seed in seeds))

    def telling(self, names: Collection[str]) -> str:
        """A loss term that weighs something in both parts, if there is one."""
        return next(iter(self.seen(names) or names))
