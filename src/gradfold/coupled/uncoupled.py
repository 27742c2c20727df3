"""A loss uncoupled: with fixed statistics in every BatchNorm, so that all else in it can be tried out on parts."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from gradfold.batch import in_own_containers
from gradfold.coupled.interception import Interception, by_fixed_statistics
from gradfold.coupled.normalised_rows import Census, NormalisedRows
from gradfold.loss import LossFn, LossOutput, read_pair, read_terms
from gradfold.window import OpenWindow

__all__: list[str] = []


def uncoupled(loss_fn: LossFn) -> LossFn:
    """`loss_fn` with fixed statistics."""

    def run(model: nn.Module, batch: Any) -> LossOutput:
        return _run(loss_fn, model, batch, Interception(by_fixed_statistics))

    return run


def watched(loss_fn: LossFn, normalised: NormalisedRows) -> LossFn:
    """The same, which also counts what each BatchNorm normalises."""

    def run(model: nn.Module, batch: Any) -> LossOutput:
        census = Census(normalised.names)
        output = _run(loss_fn, model, batch, Interception(census.count, concerns=census.concerns))
        normalised.note(batch, census.counts)
        return output

    return run


def _run(loss_fn: LossFn, model: nn.Module, batch: Any, interception: Interception) -> LossOutput:
    try:
        with eagerly(), interception:
            return loss_fn(model, batch)
    finally:
        interception.count_back()


@torch.no_grad()
def find_culprit(window: OpenWindow) -> int | None:
    """The first micro-batch whose loss is not finite though no other is in its statistics; None where there is none.

    A single NaN is in the statistics of all, and so in every loss.
    """
    loss_fn = uncoupled(window.loss_fn)
    for index in sorted(window.losses.non_finite()):
        output = loss_fn(window.model, in_own_containers(window.take(index)))
        terms = read_terms(read_pair(output)[0] if isinstance(output, tuple) else output)
        names = window.weights.names_at(index)
        if not all(bool(term.isfinite()) for name, term in terms.items() if names is None or name in names):
            return index
    return None


def eagerly() -> AbstractContextManager[Any]:
    """What was compiled runs as it was written, where BatchNorm can be met."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
