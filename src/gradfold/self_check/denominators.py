"""The experiment with own denominators: is a loss the sum of several means, which no one weight fits?

Every mean of the loss is found in its graph, with what it divides by. Where each is weighed by its own denominator in
the parts, instead of by weight=, and the parts make up the whole then, that is the cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from gradfold.engine.loss_graph import denominators_of
from gradfold.self_check.experiment import CannotKnowError, SplitExperiment, UndecidedError

_UNREADABLE = (RuntimeError, AttributeError, TypeError)  # the operator of an extension, or one whose tensors are freed


def fitting_denominators(experiment: SplitExperiment, term: str) -> list[float]:
    """What the means that a loss term is the sum of divide by in the whole; empty where that does not explain it.

    Where these numbers are to each other as in a part, one weight would fit.
    """
    shares = [experiment.share_of_part(index, term) for index in (0, 1)]
    runs: list[list[float]] = []

    def watch(terms: Mapping[str, Tensor]) -> None:
        found = denominators_of(terms[term])
        runs.append(list(found.values()))
        if len(runs) > 1:
            for (node, own), whole in zip(found.items(), runs[0], strict=False):
                node.register_prehook(partial(_scaled, own / whole / shares[len(runs) - 2]))

    if not all(shares):
        return []
    experiment.probe.watch = watch
    try:
        whole = experiment.record_whole(only=term)
        if len(runs[0]) < 2:
            return []
        comparison = experiment.compare(whole, experiment.run_parts(whole, only=term), term)
    except (CannotKnowError, UndecidedError, *_UNREADABLE):
        return []
    finally:
        experiment.probe.watch = None
    are_as_many = all(len(run) == len(runs[0]) for run in runs)
    shares_of_first = [own / whole for own, whole in zip(runs[1], runs[0], strict=False)]
    differ = not math.isclose(min(shares_of_first, default=0.0), max(shares_of_first, default=0.0))
    return runs[0] if are_as_many and differ and comparison.fits else []


def _scaled(factor: float, grad_outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if one is None else one * factor for one in grad_outputs)
