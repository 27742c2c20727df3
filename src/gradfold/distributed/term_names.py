"""The names of loss terms and metrics on all ranks, in whose order their sums are added without the names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from gradfold.engine.loss_terms import TermSums


@dataclass
class TermNames:
    """The names that some rank has returned so far, alike on all ranks.

    Attributes:
        terms: those of loss terms.
        metrics: those of scalar metrics.
        dtype: of the losses, for ranks that have none.
    """

    terms: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, sums: TermSums) -> TermNames:
        """Those of one rank."""
        return cls(sorted(sums.values), sorted(sums.metrics), sums.dtype)

    def cover(self, sums: TermSums) -> bool:
        """Whether these names are known."""
        return sums.values.keys() <= set(self.terms) and sums.metrics.keys() <= set(self.metrics)

    def learn(self, of_ranks: Iterable[TermNames]) -> None:
        """Add the names of other ranks; in one order, whatever came first."""
        every = [self, *of_ranks]
        self.terms = sorted({name for one in every for name in one.terms})
        self.metrics = sorted({name for one in every for name in one.metrics})
        self.dtype = next((one.dtype for one in every if one.dtype is not None), None)

    def pack(self, sums: TermSums, weighs: Callable[[str], bool]) -> list[float]:
        """What a rank adds: three numbers per name. `weighs`: whether a term has a positive weight on this rank."""
        numbers: list[float] = []
        for name in self.terms:
            has = name in sums.values
            numbers += [sums.values.get(name, 0.0), float(has), float(not has and weighs(name))]
        for name in self.metrics:
            numbers += [*sums.metrics.get(name, (0.0, 0.0)), float(name in sums.metrics)]
        return numbers

    def unpack(self, numbers: Sequence[float]) -> tuple[TermSums, list[str]]:
        """The sums of all ranks, and the terms that weigh something on a rank that has no value of them."""
        triples = list(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True))
        of_terms = list(zip(self.terms, triples, strict=False))
        of_metrics = zip(self.metrics, triples[len(self.terms) :], strict=True)
        values = {name: value for name, (value, has, _) in of_terms if has}
        metrics = {name: (value, part) for name, (value, part, has) in of_metrics if has}
        return TermSums(values, self.dtype, metrics), [name for name, (_, has, lacks) in of_terms if has and lacks]
