"""A padding check: whether the gradient of some rows depends on how far they are padded.

Under a token budget rows are padded less than in the whole batch, which is silently wrong where a model does not mask
its padding or a loss counts it. So some short rows run with the padding of the batch and without, dropout switched off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from operator import lt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold.batch.rows import Rows
from gradfold.batch.split import Collate, MicroBatch
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.model_checks import dropping_modules
from gradfold.engine.prefetch import prefetch
from gradfold.engine.window import Window
from gradfold.errors import BatchError, PaddingError, is_out_of_memory
from gradfold.messages import first_line, warn
from gradfold.packing.packer import width_of
from gradfold.packing.padding import PaddedBatch, tokens
from gradfold.self_check.comparison import NOISE, GradientComparison, perturbed, tolerance_of
from gradfold.self_check.layers import LayerCall, changed, first_difference, traced_layers
from gradfold.self_check.probe_run import ProbeRun
from gradfold.self_check.rng_replay import CustomGenerators
from gradfold.weights import weigh

_MOST_PADDED_ROWS = 8  # that are run with more padding than they need


class PaddingProbe(NamedTuple):
    """Some rows of a batch with more padding than they need, and the same rows as they are run, in the same order."""

    whole: MicroBatch  # with padding to the length of the batch, or of its longest row
    parts: tuple[MicroBatch, ...]  # padded to their own length
    lengths: Mapping[str, Tensor]  # for each input the length of every row of the first part


def find_in_tensors(
    batch: PaddedBatch, lengths: Mapping[str, Tensor], groups: Sequence[Rows], max_tokens: int, look: int
) -> PaddingProbe | None:
    """Some rows that need half of the padded length at most, as many as fit with all of it."""
    group = _half_as_long(groups, batch.widths, batch.padded, look)
    if group is None:
        return None
    rows = group[: max(1, min(_MOST_PADDED_ROWS, max_tokens // batch.full_width))]
    whole, part = (MicroBatch(data, range(len(rows))) for data in (batch.untrimmed(rows), batch.of_rows(rows)))
    return PaddingProbe(whole, (part,), {name: length[torch.tensor(rows)] for name, length in lengths.items()})


def find_in_samples(
    samples: Sequence[Any], collate: Collate, widths: Mapping[str, Tensor], groups: Sequence[Rows], look: int
) -> PaddingProbe | None:
    """Some samples together with the longest, of which they are half as long at most, beside both by themselves."""
    longest = int(torch.stack(list(widths.values())).sum(0).argmax())
    group = _half_as_long(groups, widths, {name: int(width[longest]) for name, width in widths.items()}, look)
    if group is None:
        return None
    rows = group[:_MOST_PADDED_ROWS]
    short, long, num = [samples[row] for row in rows], [samples[longest]], len(rows)
    return PaddingProbe(
        MicroBatch(collate(short + long), range(num + 1)),
        (MicroBatch(collate(short), range(num)), MicroBatch(collate(long), range(num, num + 1))),
        {name: width[torch.tensor(rows)] for name, width in widths.items()},
    )


def _half_as_long(
    groups: Sequence[Rows], widths: Mapping[str, Tensor], padded: Mapping[str, int], look: int
) -> Rows | None:
    """The longest rows half as long at most, which have tokens and are much padded, in all inputs; else the shortest.

    At the next look others, since these may weigh nothing.
    """

    def is_shorter_in_all(rows: Rows) -> bool:
        return all(int(width[torch.tensor(rows)].max()) < padded[name] for name, width in widths.items())

    total = sum(padded.values())
    shorter = [rows for rows in groups if width_of(widths, rows) < total]
    half = [rows for rows in shorter if 2 * width_of(widths, rows) <= total]
    found = list(filter(is_shorter_in_all, half or shorter)) or half or shorter[-1:]
    return found[look % len(found)] if found else None


class PaddingCheck:
    """Checks some rows of the batch of a window, for padding on this side; `loss_fn` is what must not depend on it."""

    def __init__(self, window: Window, loss_fn: LossFn, rows: PaddingProbe, side: str) -> None:
        self._loss_fn = loss_fn
        self._weights = weigh(window.weight, [rows.whole]), weigh(window.weight, rows.parts)
        self._rows = rows
        self._side = side
        self._probe = ProbeRun(window.model, loss_fn, window.back_propagate, dropping_modules(window.model).values())
        self._take = prefetch([rows.whole, *rows.parts], window.device)
        self._dtypes = {parameter.dtype for parameter in self._probe.parameters}

    def run(self) -> bool:
        """Whether these rows are enough to tell; False where others may be.

        Raises PaddingError on proof, BatchError where `loss_fn` takes the rows with their padding, but not without.
        """
        whole, parts = self._weights
        for of_whole, of_parts in zip(whole.own_totals(), parts.own_totals(), strict=True):
            if not math.isclose(of_whole, of_parts, rel_tol=1e-6):
                raise PaddingError(
                    f"weight= returns {of_whole:g} for some rows with the padding of the batch, and {of_parts:g} "
                    "without it, so it counts padding. Count what the loss is a mean over without it: "
                    "gradfold.token_count(...) with labels of -100 at the padding, or mask.sum().",
                    None,
                )
        if len(parts.zero_weight) == len(self._rows.parts):
            return False
        with self._probe:
            try:
                return self._compare()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                return _cannot_know("out of memory on rows with the padding of the batch")

    def _compare(self) -> bool:
        try:
            whole = self._run(0)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return _cannot_know(f"loss_fn fails on rows with the padding of the batch ({first_line(error)})")
        try:
            first, *others = (self._run(1 + number) for number in range(len(self._rows.parts)))
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise BatchError(
                f"loss_fn takes some rows with the padding of the batch, but not without it: {first_line(error)}. If "
                "a tensor of the batch has one entry per token and was not trimmed, name it: "
                'TokenBudget(..., trim=("position_ids",)).'
            ) from error
        second = others[0] if others else [None] * len(first)
        comparison = GradientComparison.of(whole, first, second, 0.5, tolerance_of(self._dtypes).gradient)
        if comparison is None or comparison.fits:
            return comparison is not None
        if not comparison.is_proof:
            return False
        noise = [comparison.differences(self._run(0, random_seed)).max() for random_seed in range(2)]
        if comparison.error <= NOISE * float(max(noise)):
            return False
        if self._probe.snapshot.has_drawn():
            return _cannot_know("loss_fn draws random numbers, other ones where there is less padding")
        raise self._error(comparison.error)

    def _run(self, number: int, random_seed: int | None = None) -> list[Tensor | None]:
        """The gradients of the whole (0) or of a part; with parameters `perturbed` where a seed is given."""

        def share(name: str) -> float:
            return self._weights[1].of_term(name).normalized[number - 1] if number else 1.0

        generators = CustomGenerators()
        self._probe.snapshot.rewind()
        try:
            with nullcontext() if random_seed is None else perturbed(self._probe.parameters, random_seed):
                return self._probe.run(self._take(number), share, generators).gradients
        finally:
            self._dtypes |= generators.dtypes

    def _error(self, error: float) -> PaddingError:
        try:
            where, layer = self._find_layer()
        except Exception:  # a model that cannot be traced: the error stands without the place
            where, layer = "the loss", None
        fix = "Mask the padding there" + ", and pass position_ids with the batch" * (self._side == "left")
        is_collated = len(self._rows.parts) > 1
        other = "pad all samples to one length in collate." if is_collated else "keep the padding: micro_batch_size=8."
        return PaddingError(
            f"{where} depends on how far rows are padded: without the padding that they do not need, which a "
            f"TokenBudget cuts off, the gradient of some is {error:.1%} off. {fix}, or {other}",
            layer,
        )

    def _find_layer(self) -> tuple[str, str | None]:
        """What first differs at a token, in words, and the name of the layer where it is one."""
        padded = self._trace(0)
        number = first_difference(padded, self._trace(1), self._differ)
        if number is None:
            return "the loss itself, in what loss_fn does with the model's outputs,", None
        found = padded[number]
        kind, layer = ("output", found.name or None) if found.is_output else ("input", None)
        return f"the {kind} of {found}", layer

    def _trace(self, number: int) -> list[LayerCall]:
        self._probe.snapshot.rewind()
        with traced_layers(self._probe.model) as calls, torch.no_grad():
            self._loss_fn(self._probe.model, self._take(number))
        return calls

    def _differ(self, padded: Tensor, trimmed: Tensor) -> bool:
        """Whether values of the first part differ, where they belong to tokens; False where that cannot be told."""
        num = len(self._rows.parts[0].rows)
        if padded.dim() != trimmed.dim() or trimmed.dim() == 0 or len(trimmed) != num:
            return False
        if not trimmed.is_floating_point() or any(map(lt, padded.shape, trimmed.shape)):
            return False
        for dim, size in enumerate(trimmed.shape):
            from_end = dim > 0 and self._side == "left"
            padded = padded.narrow(dim, padded.shape[dim] - size if from_end else 0, size)
        found = changed(padded, trimmed)
        if found.dim() > 1:
            found = found.unsqueeze(2).flatten(2).any(2)
            size = found.shape[1]
            lengths = next((one for one in self._rows.lengths.values() if 0 <= size - int(one.max()) <= 1), None)
            if lengths is not None:  # this dimension is that of the tokens
                found &= tokens(size, lengths, self._side).to(found.device)
        return bool(found.any())


def _cannot_know(reason: str) -> bool:
    warn(
        f"it could not be checked whether the gradient depends on how far the rows are padded: {reason}. If the model "
        "masks its padding and the loss leaves it out, the gradient is exact: pass self_check=False."
    )
    return True
