"""The split experiment: a micro-batch whole and in two unequal parts. Is its gradient the weighted mean of theirs?"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch

from gradfold.batch.cutting import cut_rows
from gradfold.batch.nesting import Batch
from gradfold.batch.rows import Rows, name_rows, num_rows
from gradfold.batch.split import MicroBatch
from gradfold.engine.model_checks import dropping_modules
from gradfold.engine.prefetch import prefetch
from gradfold.errors import BatchError, HookError, is_out_of_memory
from gradfold.messages import first_line
from gradfold.self_check.comparison import GradientComparison, perturbed, tolerance_of
from gradfold.self_check.probe_run import ProbeResult, ProbeRun, Shares
from gradfold.self_check.rng_replay import CustomGenerators, GeneratorMode, RecordedRandomness, RowRandomness
from gradfold.self_check.torch_private import is_compiled
from gradfold.weights import WeightOption, weigh


class CannotKnowError(Exception):
    """Nothing can be said about this loss, for the reason in the message. Internal: it ends in a warning."""


class PartFailedError(CannotKnowError):
    """A part cannot be run, or weighed; other parts may. Internal."""


class UndecidedError(Exception):
    """These rows do not tell, for the reason in the message; others may. Internal.

    Attributes:
        fits: whether the parts make up the whole, though that proves nothing.
    """

    def __init__(self, reason: str, fits: bool = False) -> None:
        super().__init__(reason)
        self.fits = fits


class SplitResult(NamedTuple):
    """What the runs gave, and the comparison of their gradients."""

    whole: ProbeResult
    parts: list[ProbeResult]
    comparison: GradientComparison


class SplitExperiment:
    """Runs a micro-batch whole and in two parts, also in variants that tell why these do not make up the whole.

    `recollated` are the parts as a collate function makes them, with a padding of their own. They run where no random
    numbers are drawn, which could not be handed to rows of another length. `share` is the normalized weight of the
    micro-batch in its window; `parts` are given where they are not cut by rows. Raises BatchError where it cannot be
    split, CannotKnowError where its parts have no weight.
    """

    def __init__(
        self,
        probe: ProbeRun,
        whole: Batch,
        rows: tuple[Rows, Rows],  # of each part, as places in the micro-batch
        weight: WeightOption,
        recollated: Sequence[Batch] | None = None,
        share: Shares = lambda name: 1.0,
        parts: Sequence[Batch] | None = None,
    ) -> None:
        self.num_rows = sum(map(len, rows))
        try:
            if parts is None:
                _check_cut(whole, self.num_rows, recollated or (), rows)
            first, second = parts or cut_rows(whole, [len(own) for own in rows])
        except (BatchError, RuntimeError):
            if recollated is None:
                raise
            first, second = recollated
        try:
            self.whole_weights = weigh(weight, [MicroBatch(whole, range(self.num_rows))])
            self.part_weights = weigh(weight, list(map(MicroBatch, recollated or (first, second), rows)))
        except Exception as error:
            raise PartFailedError(f"weight= fails on a part of a micro-batch ({first_line(error)})") from error
        batches = [MicroBatch(data, range(0)) for data in (whole, first, second, *(recollated or ()))]
        self._whole, *moved = map(prefetch(batches, probe.parameters[0].device), range(len(batches)))
        self.parts, self.recollated = moved[:2], moved[2:]
        self._running = self.parts  # these or the recollated ones
        self.are_collated = bool(recollated or parts)
        self.probe = probe
        self.rows = rows
        self.weight = weight
        self.recorded = RecordedRandomness()  # of the last run of the whole
        self._share = share
        self._tolerance = 0.0  # of the last comparison in its own precision
        self._dims: dict[int, int] = {}  # by number of a draw, the dimension that holds its rows

    def share_of_part(self, index: int, name: str) -> float:
        """The normalized weight of a part in the micro-batch."""
        return self.part_weights.of_term(name).normalized[index]

    def shares_in_window(self, index: int) -> Shares:
        """The normalized weights of a part in the window, by loss term."""
        return lambda name: self._share(name) * self.share_of_part(index, name)

    def seen(self, names: Collection[str]) -> tuple[str, ...]:
        """The loss terms of these that have a weight in both parts."""
        return tuple(name for name in names if all(self.shares_in_window(index)(name) for index in (0, 1)))

    def seen_or_first(self, names: Collection[str]) -> str:
        """A loss term that has a weight in both parts, if there is one."""
        return next(iter(self.seen(names) or names))

    def run_fast(self) -> SplitResult | None:
        """Without a look at every operator; None where more is needed, as where random numbers are drawn."""
        probe, generators = self.probe, CustomGenerators()
        if dropping_modules(probe.model):
            return None
        mode = None if is_compiled(probe.modules) else generators
        self._running = self.recollated or self.parts
        try:
            whole = self._run_whole(mode)
            if probe.snapshot.has_drawn():
                return None
            parts = self._run_parts(whole, [mode, mode])
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, HookError):
                raise
            return None  # `run` meets it again, unless it is of the mode
        if generators.states or probe.snapshot.has_drawn() or probe.snapshot.has_drawn_on_host():
            return None
        return self._result(whole, parts, {parameter.dtype for parameter in probe.parameters} | generators.dtypes)

    def run(self) -> SplitResult:
        """With the random numbers of the whole recorded, and sliced for the parts.

        Raises UndecidedError where the whole has no weight, no finite loss or no gradient, CannotKnowError where its
        random numbers cannot be handed to rows or a part fails.
        """
        whole = self.record_whole()
        self._running = self.parts if self.recorded.values else self.recollated or self.parts
        return self._result(whole, self.run_parts(whole), self.recorded.dtypes)

    def compare(self, whole: ProbeResult, parts: list[ProbeResult], term: str | None = None) -> GradientComparison:
        """Compare gradients by the weights of this loss term; None: of one that has a weight in both parts."""
        weights = self.part_weights.of_term(term or self.seen_or_first(whole.losses))
        share = len(self.rows[0]) / self.num_rows if weights.adds_up else weights.normalized[0]
        gradients = whole.gradients, parts[0].gradients, parts[1].gradients
        comparison = GradientComparison.of(*gradients, share, self._tolerance, weights.adds_up)
        if comparison is None or not any(map(torch.any, (comparison.whole, comparison.first, comparison.second))):
            raise UndecidedError("there was no gradient")
        return comparison

    def record_whole(self, only: str | None = None, factor: float = 1.0, random_seed: int | None = None) -> ProbeResult:
        """The whole; `only` this loss term and all grad_outputs times a factor, or with parameters `perturbed`."""
        recorded = RecordedRandomness()
        result = self._run_whole(recorded, only, factor, random_seed)
        self.recorded = recorded
        return result

    def run_parts(self, whole: ProbeResult, only: str | None = None, rewind_between: bool = False) -> list[ProbeResult]:
        """Both parts with the random numbers that their rows had in the whole."""
        modes = [RowRandomness(self.recorded, self.num_rows, rows) for rows in self.rows]
        results = self._run_parts(whole, modes, only, rewind_between)
        for index, mode in enumerate(modes):
            if any(map(self.shares_in_window(index), whole.losses)):
                mode.finish()
            if mode.unknown is not None:
                raise CannotKnowError(f"the random numbers of {mode.unknown} cannot be handed to rows")
            self._dims |= mode.dims
        return results

    def run_in_turn(self, *indices: int) -> list[ProbeResult]:
        """Parts (0 and 1) and the whole (2) one after another, each with what the one before it has left."""
        batches = *self._running, self._whole
        shares = self.shares_in_window(0), self.shares_in_window(1), self._share
        rows = *self.rows, range(self.num_rows)
        self.probe.snapshot.rewind()
        results = []
        for index in indices:
            mode = RowRandomness(self.recorded, self.num_rows, rows[index]) if self.recorded.values else None
            results.append(self.probe.run(batches[index], shares[index], mode))
        return results

    def fits_when_padded_alike(self, term: str) -> bool:
        """Whether parts cut from the whole, with its padding, make it up where those that were collated do not."""
        if not self.are_collated or self.recorded.values:
            return False
        try:
            _check_cut(self._whole, self.num_rows, self.recollated, self.rows)
            parts = cut_rows(self._whole, [len(rows) for rows in self.rows])
        except (BatchError, RuntimeError):
            return False
        running, self._running = self._running, parts
        try:
            whole = self.record_whole()
            return self.compare(whole, self.run_parts(whole), term).fits
        except (CannotKnowError, UndecidedError):
            return False
        finally:
            self._running = running

    def run_with_shared_randomness(self) -> GradientComparison:
        """Whole and parts with the same random numbers for every row."""
        every = range(self.num_rows), *self.rows
        mode, *modes = (RowRandomness(self.recorded, len(rows), rows, self._dims) for rows in every)
        whole = self._run_whole(mode)
        return self.compare(whole, self._run_parts(whole, modes))

    def _run_whole(
        self, mode: GeneratorMode, only: str | None = None, factor: float = 1.0, random_seed: int | None = None
    ) -> ProbeResult:
        self.probe.snapshot.rewind()
        # After the rewind, which would put back frozen parameters that were moved.
        with nullcontext() if random_seed is None else perturbed(self.probe.parameters, random_seed):
            result = self.probe.run(self._whole, lambda name: factor * self._share(name), mode, only)
        if self.probe.has_drawn_unseen:
            raise CannotKnowError("a hook draws random numbers in the backward pass, which cannot be handed to rows")
        host = self.probe.snapshot.has_drawn_on_host()
        if host is not None:
            raise CannotKnowError(f"loss_fn draws from {host}, whose numbers cannot be handed to rows")
        weighed = [name for name in result.losses if any(self.share_of_part(index, name) for index in (0, 1))]
        if not weighed:
            raise UndecidedError("the rows weighed nothing")
        if not all(math.isfinite(float(result.losses[name])) for name in weighed):
            raise UndecidedError("the loss was not finite")  # as the window itself will say
        return result

    def _run_parts(
        self, whole: ProbeResult, modes: Sequence[GeneratorMode], only: str | None = None, rewind_between: bool = False
    ) -> list[ProbeResult]:
        results = []
        for index, (part, mode) in enumerate(zip(self._running, modes, strict=True)):
            if index == 0 or rewind_between:
                self.probe.snapshot.rewind()
            shares = self.shares_in_window(index)
            if not any(map(shares, whole.losses)):  # the engine would not run it either
                results.append(ProbeResult([None] * len(whole.gradients), {}))
                continue
            try:
                results.append(self.probe.run(part, shares, mode, only))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise PartFailedError(
                    f"loss_fn fails on {name_rows(self.rows[index])} of a micro-batch that it takes as a whole "
                    f"({first_line(error)})"
                ) from error
        return results

    def _result(self, whole: ProbeResult, parts: list[ProbeResult], dtypes: set[torch.dtype]) -> SplitResult:
        self._tolerance = tolerance_of(dtypes).gradient
        return SplitResult(whole, parts, self.compare(whole, parts))


def _check_cut(whole: Batch, size: int, recollated: Sequence[Batch], rows: Sequence[Rows]) -> None:
    """Raise BatchError where a batch cannot be cut by rows; where it is collated, collation says what a row is.

    What tensors agree on may be as much by accident: three images have three channels.
    """
    for data, expected in ((whole, size), *zip(recollated, map(len, rows), strict=bool(recollated))):
        found = num_rows(data)
        if found != expected:
            raise BatchError(f"what seems to be rows is not: there are {found} where {expected} samples were collated")
