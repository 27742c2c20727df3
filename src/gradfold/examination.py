"""An examination: one micro-batch, whole and in two parts, and what their gradients say about the loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from gradfold.batch import Batch
from gradfold.draws import DrawsOfRows, RecordedDraws
from gradfold.errors import NotDecomposableError
from gradfold.mixture import Cause, Mixture
from gradfold.trial import Outcome, Shares, Trial, drew_on_host, host_random_state
from gradfold.weight import WeightOption
from gradfold.weight_search import name_weight

__all__: list[str] = []

# Relative differences that rounding explains, by the lowest precision met; proof is four times as much.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 3e-4, torch.float16: 0.02, torch.bfloat16: 0.08}
_PROOF = 4
_NOISE = 30  # how many times the effect of a rounding error in every parameter a difference must be


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
        weight: the option as the user gave it.
    """

    whole: Batch
    parts: tuple[Batch, Batch]
    recollated: tuple[Batch, Batch] | None
    rows: tuple[range, range]
    shares: Shares
    part_shares: tuple[Shares, Shares]
    weight: WeightOption


class Examination:
    """Examines one micro-batch within a trial."""

    def __init__(self, trial: Trial, model: nn.Module, examined: Examined) -> None:
        self._trial = trial
        self._model = model
        self._examined = examined
        self._recorded = RecordedDraws()
        self._parts = examined.parts
        self._is_certain = True

    def run(self) -> tuple[str, ...]:
        """Return the names of the loss terms if the parts fit the whole.

        Raises:
            NotDecomposableError: they do not, which is proved.
            UndecidedError: these rows do not tell.
            CannotKnowError: no rows will tell.
        """
        return self._glance() or self._look_closely()

    def _glance(self) -> tuple[str, ...] | None:
        """Compare without an eye on every operator, which takes time: enough where nothing is drawn and parts fit."""
        if any(isinstance(module, _DropoutNd) and module.training and module.p for module in self._model.modules()):
            return None
        whole = self._run_whole(nullcontext())
        if self._trial.has_drawn():
            return None
        self._trial.rewind()
        self._parts = self._examined.recollated or self._examined.parts
        try:
            parts = [self._run_part(whole, index, nullcontext()) for index in (0, 1)]
        except (CannotKnowError, NotDecomposableError):
            return None
        mixture = self._mix(whole, parts, next(iter(whole.losses)))
        dtypes = {parameter.dtype for parameter in self._model.parameters()}
        tolerance = self._tolerance(dtypes)
        if mixture is None or not float(mixture.errors.max()) <= tolerance:
            return None
        self._check_separation(mixture, tolerance)
        return tuple(whole.losses)

    def _look_closely(self) -> tuple[str, ...]:
        whole = self._record_whole()
        self._parts = self._examined.parts
        if self._examined.recollated is not None and not self._recorded.values:
            self._parts = self._examined.recollated
        parts = self._run_parts(whole)
        mixture = self._mix(whole, parts, next(iter(whole.losses)))
        if mixture is None or not bool(mixture.errors.isfinite().all()):
            raise UndecidedError
        tolerance = self._tolerance(self._recorded.dtypes)
        if float(mixture.errors.max()) > _PROOF * tolerance:
            self._convict(whole, mixture, tolerance)
        if float(mixture.errors.max()) > tolerance:
            raise UndecidedError
        self._check_separation(mixture, tolerance)
        return tuple(whole.losses)

    def _check_separation(self, mixture: Mixture, tolerance: float) -> None:
        """Raise UndecidedError where the parts are so alike that any weights would fit."""
        if mixture.separation() < min(100 * tolerance, 0.3):
            raise UndecidedError

    def _run_whole(self, mode: AbstractContextManager[Any], only: str | None = None) -> Outcome:
        self._trial.rewind()
        before = host_random_state()
        outcome = self._trial.run(self._examined.whole, self._examined.shares, mode, only)
        moved = drew_on_host(before)
        if moved is not None:
            raise CannotKnowError(f"loss_fn draws from {moved}, whose numbers cannot be handed to rows")
        is_weighed = any(shares(name) for name in outcome.losses for shares in self._examined.part_shares)
        if not is_weighed or not _are_finite(outcome):
            raise UndecidedError  # nothing to see, or something that the window itself will say
        return outcome

    def _record_whole(self, only: str | None = None) -> Outcome:
        recorded = RecordedDraws()
        try:
            outcome = self._run_whole(recorded, only)
        finally:
            recorded.restore_generators()
        self._recorded = recorded
        return outcome

    def _run_parts(self, whole: Outcome, only: str | None = None, rewind_between: bool = False) -> list[Outcome]:
        self._trial.rewind()
        outcomes = []
        for index in (0, 1):
            if index and rewind_between:
                self._trial.rewind()
            draws = DrawsOfRows(self._recorded, self._num_rows, self._examined.rows[index])
            try:
                outcomes.append(self._run_part(whole, index, draws, only))
            finally:
                draws.restore_generators()
            if any(map(self._seeds_of(index), whole.losses)):
                draws.finish()
            if draws.unknown is not None:
                raise CannotKnowError(f"the random numbers of {draws.unknown} cannot be handed to rows")
            self._is_certain &= draws.is_certain
        return outcomes

    def _run_part(
        self, whole: Outcome, index: int, mode: AbstractContextManager[Any], only: str | None = None
    ) -> Outcome:
        shares = self._seeds_of(index)
        if not any(map(shares, whole.losses)):  # the engine would not run it either
            return Outcome([None] * len(whole.gradients), {})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the window itself will say them
                outcome = self._trial.run(self._parts[index], shares, mode, only)
        except Exception as error:
            raise CannotKnowError(
                f"loss_fn fails on {_rows(self._examined.rows[index])} of a micro-batch that it takes as a whole "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            ) from error
        self._check_empty(outcome, index)
        return outcome

    @property
    def _num_rows(self) -> int:
        return self._examined.rows[1].stop

    def _seeds_of(self, index: int) -> Shares:
        shares, part_shares = self._examined.shares, self._examined.part_shares[index]
        return lambda name: shares(name) * part_shares(name)

    def _mix(self, whole: Outcome, parts: list[Outcome], term: str) -> Mixture | None:
        share = self._examined.part_shares[0](term)
        return Mixture.of(whole.gradients, parts[0].gradients, parts[1].gradients, share)

    def _tolerance(self, dtypes: Iterable[torch.dtype]) -> float:
        return max(_TOLERANCES.get(dtype, 0.0) for dtype in {torch.float64, *dtypes})

    def _check_empty(self, outcome: Outcome, index: int) -> None:
        for name, loss in outcome.losses.items():
            if self._seeds_of(index)(name) and not math.isfinite(float(loss)):
                weight = name_weight(*self._examined.parts, self._sizes(), float(index))
                raise NotDecomposableError(
                    f"the loss term {name!r} of {_rows(self._examined.rows[index])} of a micro-batch is {float(loss)}, "
                    "though that of the whole is finite: a mean over nothing. Give weight= the number of things that "
                    f"it averages, so that a part without any is left out: weight={weight or '...'}.",
                    "empty",
                    name,
                    weight,
                )

    def _sizes(self) -> tuple[int, int]:
        return len(self._examined.rows[0]), len(self._examined.rows[1])

    def _convict(self, whole: Outcome, mixture: Mixture, tolerance: float) -> None:
        """Raise NotDecomposableError, unless something else explains the difference."""
        self._doubt(mixture, tolerance)
        for name in whole.losses:
            of_term = mixture if len(whole.losses) == 1 else self._mix_alone(name)
            if of_term is not None and float(of_term.errors.max()) > _PROOF * tolerance:
                raise self._accuse(of_term, name, tolerance)
        raise self._accuse(mixture, next(iter(whole.losses)), tolerance)

    def _doubt(self, mixture: Mixture, tolerance: float) -> None:
        suspicious = mixture.errors > _PROOF * tolerance
        again = self._record_whole()
        if bool((mixture.differences(again.gradients) > mixture.errors / 4)[suspicious].any()):
            raise CannotKnowError(
                "two runs over the same rows gave different gradients: loss_fn keeps state outside of buffers, or has "
                "random numbers of its own"
            )
        with torch.no_grad(), _Jittered(self._model.parameters()), torch.enable_grad():
            jittered = self._record_whole()
        noise = mixture.differences(jittered.gradients)
        if not bool((mixture.errors > _NOISE * noise)[suspicious].any()):
            raise UndecidedError
        if not self._is_certain:
            raise CannotKnowError("some random numbers are laid out in a way that does not show whose rows they are")
        if any(parameter._backward_hooks for parameter in self._model.parameters()):
            raise UndecidedError  # hooks see the gradient of each micro-batch, which the user was told

    def _mix_alone(self, term: str) -> Mixture | None:
        whole = self._record_whole(only=term)
        return self._mix(whole, self._run_parts(whole, only=term), term)

    def _accuse(self, mixture: Mixture, term: str, tolerance: float) -> NotDecomposableError:
        cause, share = mixture.explain(tolerance)
        if cause == "weights" and share is not None:
            return self._accuse_weights(term, mixture.share, share)
        if cause != "coupled":
            return NotDecomposableError(f"{self._subject(term)} {_REMEDIES[cause]}", cause, term)
        worst = int(mixture.errors.argmax())
        found = f"{float(mixture.errors[worst]):.1%} off"
        if self._recorded.uses_batch_norm:
            return NotDecomposableError(f"{self._subject(term)} {_BATCH_NORM} ({found})", "batch_norm", term)
        whole = self._record_whole()
        buffers = self._trial.changed_buffers()
        if buffers:
            alone = self._mix(whole, self._run_parts(whole, rewind_between=True), term)
            if alone is not None and float(alone.errors.max()) < tolerance:
                return NotDecomposableError(
                    f"{self._subject(term)} depends on state that forward passes move ({', '.join(buffers[:3])}), so "
                    f"that a part sees another state than the whole ({found}). Freeze it while gradients accumulate, "
                    "or move it once per update.",
                    "state",
                    term,
                )
        return NotDecomposableError(f"{self._subject(term)} {_COUPLED} ({found})", "coupled", term)

    def _subject(self, term: str) -> str:
        return f"the loss{'' if term == 'loss' else f' term {term!r}'}"

    def _accuse_weights(self, term: str, declared: float, fitting: float) -> NotDecomposableError:
        weight = name_weight(*self._examined.parts, self._sizes(), fitting)
        remedy = (
            f"Write weight={weight}."
            if weight is not None
            else "Give weight= the denominator of the mean, as a function of the micro-batch: mask.sum(), "
            "class_weights[labels].sum(), or the like. If the loss compares rows (a maximum, logsumexp, a scale of its "
            "own), no weight helps: run the batch whole (micro_batch_size=None)."
        )
        if isinstance(self._examined.weight, dict) and weight is not None:
            remedy = f"Write weight={{..., {term!r}: {weight}}}."
        return NotDecomposableError(
            f"{self._subject(term)} is a mean over something else than weight= says: {_rows(self._examined.rows[0])} "
            f"of a micro-batch of {self._num_rows} make up {fitting:.2%} of its gradient, and {declared:.2%} by their "
            f"weight. {remedy}",
            "weights",
            term,
            weight,
        )


_REMEDIES: dict[Cause, str] = {
    "sum": "is a sum over the rows, not a mean, so that its size depends on how the batch is cut. Return the mean: "
    "reduction='mean', or divide by the number of things summed and give weight= that number.",
    "seed": "has a backward pass that ignores the gradient coming into it (grad_output), which carries the weight of "
    "the micro-batch. Multiply by grad_output in its backward().",
}
_COUPLED = (
    "makes the samples of a batch depend on each other (in-batch negatives, statistics over the batch, rows that are "
    "mixed): no weighting of two parts gives the gradient of the whole. Run the batch whole (micro_batch_size=None), "
    "or take such terms out; two-phase losses are not in this version yet."
)
_BATCH_NORM = (
    "normalises by the statistics of the batch (functional batch_norm with training=True), of which a micro-batch has "
    "its own. Use group_norm, training=False, or an nn.BatchNorm module with batch_norm=."
)


class _Jittered:
    """Every parameter off by a rounding error, for as long as the `with` block runs: what that moves is noise."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.is_floating_point()]

    def __enter__(self) -> None:
        self._kept = [parameter.detach().clone() for parameter in self._parameters]
        for number, parameter in enumerate(self._parameters):
            signs = torch.ones_like(parameter)
            signs.view(-1)[number % 2 :: 2] = -1
            parameter.add_(parameter * signs, alpha=torch.finfo(parameter.dtype).eps)

    def __exit__(self, *_: object) -> None:
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(kept)


def _are_finite(outcome: Outcome) -> bool:
    return all(math.isfinite(float(loss)) for loss in outcome.losses.values())


def _rows(rows: range) -> str:
    return f"rows {rows.start} to {rows.stop - 1}" if len(rows) > 1 else f"row {rows.start}"
