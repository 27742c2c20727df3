"""An examination: one micro-batch, whole and in two parts, and what their gradients say about the loss.

Tried runs: what the guard's runs of a micro-batch, whole and in two parts, show besides gradients.

What is examined: a micro-batch, its two parts and their weights; and the ways in which nothing comes of it.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import Batch
from gradfold.errors import NotDecomposableError, is_out_of_memory
from gradfold.self_check import diagnosis as accusation
from gradfold.self_check.comparison import GradientComparison, Perturbation, tolerance_of
from gradfold.self_check.diagnosis import name_weight
from gradfold.self_check.rng_replay import RecordedRandomness, SharedRandomness, SlicedRandomness
from gradfold.self_check.trial import ProbeResult, Shares, Trial
from gradfold.weights import WeightOption

__all__: list[str] = []

T = TypeVar("T")


@dataclass(frozen=True)
class ObservedRun(Generic[T]):
    """One of them: how many rows it had, and what was seen of it."""

    num_rows: int
    seen: T


@dataclass(frozen=True)
class Observation(Generic[T]):
    """Three runs over the same rows, with the same random numbers for each."""

    whole: ObservedRun[T]
    parts: tuple[ObservedRun[T], ObservedRun[T]]


class Observations(Generic[T]):
    """Notes runs as they come, in the order whole, part, part or part, part, whole."""

    def __init__(self) -> None:
        self._last: deque[ObservedRun[T]] = deque(maxlen=3)
        self._found: Observation[T] | None = None

    def note(self, num_rows: int | None, seen: T) -> None:
        """A run of as many rows, None where nobody can count them."""
        if num_rows is None:
            self._last.clear()
            return
        self._last.append(ObservedRun(num_rows, seen))
        if len(self._last) < 3:
            return
        first, second, third = self._last
        if first.num_rows == second.num_rows + third.num_rows:
            self._found = Observation(first, (second, third))
        elif third.num_rows == first.num_rows + second.num_rows:
            self._found = Observation(third, (first, second))

    def take(self) -> Observation[T] | None:
        """The last three that belong together, once; only where the guard was content is their randomness the same."""
        found, self._found = self._found, None
        self._last.clear()
        return found


class CannotKnowError(Exception):
    """Nothing can be said about this loss, for the reason in the message. Internal: it ends in a warning."""


class UndecidedError(Exception):
    """These rows do not tell; others may. Internal."""


@dataclass(frozen=True)
class SplitCase:
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


_PROOF = 4  # how many times what rounding explains a difference must be
_NOISE = 30  # how many times the effect of a rounding error in every parameter a difference must be


class SplitExperiment:
    """Examines one micro-batch within a trial."""

    def __init__(self, trial: Trial, model: nn.Module, examined: SplitCase) -> None:
        self._trial = trial
        self._model = model
        self._examined = examined
        self._recorded = RecordedRandomness()
        self._parts = examined.parts
        self._dims: dict[int, int] = {}  # by draw, the dimension that holds its rows

    def run(self, glance: Any = None) -> tuple[str, ...]:
        """Return the names of the loss terms that could be seen, if the parts fit the whole.

        Args:
            glance: at the same, whose parts may have been run.

        Raises:
            NotDecomposableError: they do not, which is proved.
            UndecidedError: these rows do not tell.
            CannotKnowError: no rows will tell.
        """
        from gradfold.self_check.glance import Glance as _Glance

        return (glance or _Glance(self._trial, self._examined)).run() or self.look_closely()

    def look_closely(self) -> tuple[str, ...]:
        """As `run`, with an eye on every operator."""
        whole = self._record_whole()
        self._parts = self._examined.parts
        if self._examined.recollated is not None and not self._recorded.values:
            self._parts = self._examined.recollated
        parts = self._run_parts(whole)
        mixture = self._mix(whole, parts, self._examined.telling(whole.losses))
        if mixture is None or not bool(mixture.errors.isfinite().all()):
            raise UndecidedError
        tolerance = tolerance_of(self._recorded.dtypes)
        if float(mixture.errors.max()) > _PROOF * tolerance:
            self._convict(whole, mixture, tolerance)
        if float(mixture.errors.max()) > tolerance:
            raise UndecidedError
        if not mixture.is_telling(tolerance):
            raise UndecidedError
        return self._examined.seen(whole.losses)

    def _run_whole(
        self, mode: AbstractContextManager[Any], only: str | None = None, shares: Shares | None = None
    ) -> ProbeResult:
        self._trial.rewind()
        outcome = self._trial.run(self._examined.whole, shares or self._examined.shares, mode, only)
        moved = self._trial.has_drawn_on_host()
        if moved is not None:
            raise CannotKnowError(f"loss_fn draws from {moved}, whose numbers cannot be handed to rows")
        is_weighed = any(shares(name) for name in outcome.losses for shares in self._examined.part_shares)
        if not is_weighed or not _are_finite(outcome):
            raise UndecidedError  # nothing to see, or something that the window itself will say
        return outcome

    def _record_whole(self, only: str | None = None, shares: Shares | None = None) -> ProbeResult:
        recorded = RecordedRandomness()
        try:
            outcome = self._run_whole(recorded, only, shares)
        finally:
            recorded.restore_generators()
        self._recorded = recorded
        return outcome

    def _run_parts(
        self, whole: ProbeResult, only: str | None = None, rewind_between: bool = False
    ) -> list[ProbeResult]:
        self._trial.rewind()
        outcomes = []
        for index in (0, 1):
            if index and rewind_between:
                self._trial.rewind()
            draws = SlicedRandomness(self._recorded, self._num_rows, self._examined.rows[index])
            try:
                outcomes.append(self._run_part(whole, index, draws, only))
            finally:
                draws.restore_generators()
            if any(map(self._examined.seeds_of(index), whole.losses)):
                draws.finish()
            if draws.unknown is not None:
                raise CannotKnowError(f"the random numbers of {draws.unknown} cannot be handed to rows")
            self._dims |= draws.dims
        return outcomes

    def _run_part(
        self, whole: ProbeResult, index: int, mode: AbstractContextManager[Any], only: str | None = None
    ) -> ProbeResult:
        shares = self._examined.seeds_of(index)
        if not any(map(shares, whole.losses)):  # the engine would not run it either
            return ProbeResult([None] * len(whole.gradients), {})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the window itself will say them
                outcome = self._trial.run(self._parts[index], shares, mode, only)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            rows = accusation.name_rows(self._examined.rows[index])
            raise CannotKnowError(
                f"loss_fn fails on {rows} of a micro-batch that it takes as a whole "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            ) from error
        self._check_empty(outcome, index)
        return outcome

    @property
    def _num_rows(self) -> int:
        return self._examined.rows[1].stop

    @property
    def _sizes(self) -> tuple[int, int]:
        return len(self._examined.rows[0]), len(self._examined.rows[1])

    def _mix(self, whole: ProbeResult, parts: list[ProbeResult], term: str) -> GradientComparison | None:
        share = self._examined.part_shares[0](term)
        return GradientComparison.of(whole.gradients, parts[0].gradients, parts[1].gradients, share)

    def _check_empty(self, outcome: ProbeResult, index: int) -> None:
        for name, loss in outcome.losses.items():
            if self._examined.seeds_of(index)(name) and not math.isfinite(float(loss)):
                weight = name_weight(*self._examined.parts, self._sizes, float(index))
                raise accusation.is_empty(name, self._examined.rows[index], float(loss), weight)

    def _convict(self, whole: ProbeResult, mixture: GradientComparison, tolerance: float) -> None:
        """Raise NotDecomposableError, unless something else explains the difference."""
        if any(parameter._backward_hooks for parameter in self._model.parameters()):
            raise UndecidedError  # hooks see the gradient of each micro-batch, which the user was told
        suspicious = mixture.errors > _PROOF * tolerance
        self._check_reproducible(mixture, suspicious)
        if not bool((mixture.errors > _NOISE * self._noise(mixture, tolerance))[suspicious].any()):
            raise UndecidedError
        self._check_draws(whole, tolerance)
        self._check_weights(whole)
        for name in whole.losses:
            of_term = mixture if len(whole.losses) == 1 else self._mix_alone(name)
            if of_term is not None and float(of_term.errors.max()) > _PROOF * tolerance:
                raise self._accuse(of_term, name, tolerance)
        raise self._accuse(mixture, self._examined.telling(whole.losses), tolerance)

    def _check_reproducible(self, mixture: GradientComparison, suspicious: Tensor) -> None:
        again = self._record_whole()
        if bool((mixture.differences(again.gradients) > mixture.errors / 4)[suspicious].any()):
            raise CannotKnowError(
                "two runs over the same rows gave different gradients: loss_fn keeps state outside of buffers, or has "
                "random numbers of its own"
            )

    def _noise(self, mixture: GradientComparison, tolerance: float) -> Tensor:
        """What rounding moves, per parameter: of the parameters, and of the seeds, which small types lose."""
        noise = torch.zeros_like(mixture.errors)
        for seed in range(4):
            with Perturbation(self._model.parameters(), seed):
                jittered = self._record_whole()
            noise = torch.maximum(noise, mixture.differences(jittered.gradients))
        if mixture.explain(tolerance)[0] != "seed":
            for factor in (0.3, 0.7):
                scaled = self._record_whole(shares=self._scaled_shares(factor))
                gradients = [None if gradient is None else gradient / factor for gradient in scaled.gradients]
                noise = torch.maximum(noise, mixture.differences(gradients))
        return noise

    def _scaled_shares(self, factor: float) -> Shares:
        return lambda name: factor * self._examined.shares(name)

    def _check_draws(self, whole: ProbeResult, tolerance: float) -> None:
        """Raise CannotKnowError where the parts fit once every row has the same random numbers."""
        if not self._recorded.values:
            return
        dims, recorded = dict(self._dims), self._recorded
        equal = [SharedRandomness(recorded, dims) for _ in range(3)]
        alike = self._run_whole(equal[0])
        self._trial.rewind()
        parts = [self._run_part(whole, index, equal[index + 1]) for index in (0, 1)]
        for draws in equal:
            draws.restore_generators()
        mixture = self._mix(alike, parts, self._examined.telling(whole.losses))
        if mixture is None or not float(mixture.errors.max()) > _PROOF * tolerance:
            raise CannotKnowError("random numbers are drawn for rows in another order than they came")

    def _check_weights(self, whole: ProbeResult) -> None:
        """Raise CannotKnowError where the weights of the parts do not make up that of the whole."""
        for name in whole.losses:
            declared, parts = self._examined.weights_of(name)
            if not math.isclose(declared, parts, rel_tol=1e-6):
                raise CannotKnowError(
                    f"weight= gives {declared:g} for a micro-batch and {parts:g} for its two parts together, so it is "
                    "no count of what the loss is a mean over"
                )

    def _mix_alone(self, term: str) -> GradientComparison | None:
        whole = self._record_whole(only=term)
        return self._mix(whole, self._run_parts(whole, only=term), term)

    def _accuse(self, mixture: GradientComparison, term: str, tolerance: float) -> NotDecomposableError:
        cause, share = mixture.explain(tolerance)
        error = float(mixture.errors.max())
        if share is not None:
            weight = name_weight(*self._examined.parts, self._sizes, share)
            is_by_name = isinstance(self._examined.weight, Mapping)
            rows = self._examined.rows[0]
            return accusation.has_other_weights(term, rows, self._num_rows, mixture.share, share, weight, is_by_name)
        if cause == "sum":
            return accusation.is_sum(term)
        if cause == "seed":
            return accusation.ignores_seed(term)
        if self._recorded.uses_batch_norm:
            return accusation.normalizes_by_batch(term, error)
        whole = self._record_whole()
        buffers = self._trial.changed_buffers()
        if buffers:
            alone = self._mix(whole, self._run_parts(whole, rewind_between=True), term)
            if alone is not None and float(alone.errors.max()) < tolerance:
                return accusation.moves_state(term, error, buffers)
        return accusation.couples_samples(term, error)


def _are_finite(outcome: ProbeResult) -> bool:
    return all(math.isfinite(float(loss)) for loss in outcome.losses.values())
