"""What ranks must have in common: options and parameters, compared by a digest, and by name where that differs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn
from torch.nn.parameter import is_lazy

from gradfold.distributed.agreement import digest
from gradfold.distributed.term_names import TermNames
from gradfold.errors import DistributedError
from gradfold.weights import WeightOption


@dataclass(frozen=True)
class RankSettings:
    """The settings of one rank.

    Attributes:
        options: arguments of the accumulator, by name, as text.
        parameters: names and shapes, in order.
        places_rows: whether it counts where the rows of a rank are in the batch of all.
        names: what loss functions have returned so far.
    """

    options: Mapping[str, str]
    parameters: Sequence[str]
    places_rows: bool = False
    names: TermNames = field(default_factory=TermNames)

    @classmethod
    def of(cls, model: nn.Module, weight: WeightOption, places_rows: bool = False, **options: object) -> RankSettings:
        """Those of a model, and of options that decide what is summed over ranks, and when."""
        texts = {name: str(value) for name, value in options.items()}
        return cls({"weight": _shown(weight), **texts}, list(_parameters(model)), places_rows)

    def digest(self) -> list[float]:
        """What ranks compare: the digest of all."""
        return digest(self._settings + repr(self.names).encode(errors="surrogatepass"))

    @cached_property
    def _settings(self) -> bytes:
        text = repr((sorted(self.options.items()), self.parameters, self.places_rows))
        return hashlib.blake2b(text.encode(errors="surrogatepass")).digest()


def refuse_differing(of_ranks: Sequence[RankSettings]) -> None:
    """Raise DistributedError that names what differs; every rank raises the same."""
    first = of_ranks[0]
    for rank, other in enumerate(of_ranks):
        for name in {**first.options, **other.options}:
            ours, theirs = first.options.get(name), other.options.get(name)
            if ours != theirs:
                raise DistributedError(
                    f"{name}= differs between ranks: {ours} on rank 0, {theirs} on rank {rank}. Pass the same options "
                    "on all ranks."
                )
        if first.places_rows != other.places_rows:
            raise DistributedError(
                f"counter-based dropout is in the model of rank 0 or of rank {rank}, and not in both. Call "
                "gradfold.convert_dropout(model) on all ranks."
            )
        if first.parameters != other.parameters:
            pairs = zip(first.parameters, other.parameters, strict=False)
            ours, theirs = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
            seen = f": {ours} on rank 0, {theirs} on rank {rank}" if ours else ""
            counts = f"{len(first.parameters)} and {len(other.parameters)}"
            raise DistributedError(
                f"the models of rank 0 and rank {rank} have other parameters ({counts}){seen}. Their gradients cannot "
                "be summed; build the same model on all ranks."
            )


def _parameters(model: nn.Module) -> Iterable[str]:
    for name, parameter in model.named_parameters():
        yield name if is_lazy(parameter) else f"{name} {tuple(parameter.shape)}"


def _shown(weight: WeightOption) -> str:
    if isinstance(weight, Mapping):
        return str({name: _shown(one) for name, one in sorted(weight.items())})
    if isinstance(weight, str):
        return weight
    return getattr(weight, "__qualname__", type(weight).__qualname__)
