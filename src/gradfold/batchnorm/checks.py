"""Exact BatchNorm in the self-check: a loss is tried with fixed statistics, and what BatchNorm gets is seen.

The statistics of a window are those of the whole batch where micro-batches together bring the values that the batch
would bring. Prototypes are brought by every micro-batch, and padding depends on it. The number of values tells:

    per sample    a micro-batch brings as many values as its two parts together
    shared        each part brings as many as the whole; they are counted once, and must be the same everywhere
    mixed         anything else: refused, since the statistics would differ
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from gradfold.batch.nesting import Batch, structure
from gradfold.batch.rows import count_rows
from gradfold.batch.split import MicroBatch
from gradfold.batchnorm.intercept import BatchNormCall, BatchNormMode
from gradfold.batchnorm.moments import Moments
from gradfold.batchnorm.policy import layer_error
from gradfold.engine.loss_terms import LossFn, LossOutput
from gradfold.messages import warn
from gradfold.self_check.observations import Observations

Key: TypeAlias = "tuple[Hashable, int, str]"
"""A call of batch_norm: the structure of the batch, its number in the forward pass, and the name of its layer."""


class InputDependence:
    """How the inputs of BatchNorm depend on the batch, in the windows of one accumulator."""

    def __init__(self, is_collated: bool) -> None:
        self._runs: Observations[list[tuple[str, int]]] = Observations()
        self._structure: Hashable = None  # of the batch in these runs
        self.names: dict[int, str] = {}  # of layers, by the id of their running mean
        self._is_collated = is_collated  # one micro-batch at a time
        # Per sample: "even" where every row brings as many values.
        self._known: dict[Key, Literal["shared", "even", "uneven"]] = {}
        self._warned_of: set[str] = set()

    def note(self, batch: Batch, counts: list[tuple[str, int]]) -> None:
        """What a run of the self-check has counted."""
        self._structure = structure(batch)
        self._runs.note(count_rows(batch), counts)

    def judge(self, passed: bool) -> None:
        """Learn from the self-check's runs, where it passed; BatchNormError where the input of a call is mixed."""
        found = self._runs.take()
        if found is None or not passed:
            return
        if len({tuple(name for name, _ in run.seen) for run in found}) > 1:
            return
        whole, first, second = found
        for number, (name, count) in enumerate(whole.seen):
            key = self._structure, number, name
            counts = first.seen[number][1], second.seen[number][1]
            if sum(counts) == count:
                is_even = counts[0] * second.num_rows == counts[1] * first.num_rows
                self._known[key] = "even" if is_even else "uneven"
            elif counts == (count, count):
                self._known[key] = "shared"
            else:
                raise layer_error(
                    [name],
                    f"normalizes {count} values per channel of {whole.num_rows} rows, and {counts[0]} and "
                    f"{counts[1]} when these run in two parts, so its statistics would not be those of the whole "
                    "batch. Normalize prototypes or queries that are concatenated with the rows in a BatchNorm (or a "
                    "call of it) of their own. Have collate= pad to one length, or normalize x[mask]. GroupNorm has no "
                    "such limit: gradfold.convert_batch_norm(model).",
                )

    def is_shared(self, key: Key, parts: Sequence[Moments], micro_batches: Sequence[MicroBatch]) -> bool:
        """Whether all micro-batches bring the very same to a call; BatchNormError where they should and do not."""
        known = self._known.get(key)
        if known == "shared":
            if not _are_same(parts):
                raise layer_error(
                    [key[-1]],
                    f"normalizes {parts[0].count} values per channel however many rows there are, and they are not the "
                    "same in every micro-batch (a mean over rows, dropout on prototypes). Normalize before rows are "
                    "reduced, or use GroupNorm: gradfold.convert_batch_norm(model).",
                )
            return True
        if self._is_collated and known != "uneven":
            self._warn_of_padding(key[-1], [part.count for part in parts], micro_batches)
        return known is None and self._seems_shared(key, parts, micro_batches)

    def _seems_shared(self, key: Key, parts: Sequence[Moments], micro_batches: Sequence[MicroBatch]) -> bool:
        """The same for a call that the self-check has not seen."""
        if len(parts) == 1 or len({part.count for part in parts}) > 1:
            return False
        if not _are_same(parts) or not bool(parts[0].variance.any()):
            self._known[key] = "even"  # or uneven, as far as is known
            return False
        if len({len(part.rows) for part in micro_batches}) > 1:
            return True
        self._warn_once(
            "shared",
            f"BatchNorm in {key[-1]} got the same mean and variance in every micro-batch, all of which have as many "
            "rows. If what it normalizes does not come from the batch (prototypes, class embeddings), its running "
            "variance counts it several times: leave self_check on, which tells.",
        )
        return False

    def _warn_of_padding(self, layer: str, counts: Sequence[int], micro_batches: Sequence[MicroBatch]) -> None:
        pairs = [(count, len(part.rows)) for count, part in zip(counts, micro_batches, strict=True)]
        if not all(rows and count % rows == 0 for count, rows in pairs):
            return
        per_row = sorted({count // rows for count, rows in pairs})
        if len(per_row) > 1:
            self._warn_once(
                "padding",
                f"BatchNorm in {layer} normalizes {per_row[0]} values per channel for each row of one micro-batch, and "
                f"{per_row[-1]} for each of another. If rows are padded to the longest of their micro-batch, the "
                "padding is in the statistics, and the batch collated as a whole would have more of it: have collate= "
                "pad to one length, or normalize x[mask]. If this is what a mask leaves, or every row is a set of its "
                "own size (a graph's nodes), all is well.",
            )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned_of:
            self._warned_of.add(what)
            warn(message)


def _are_same(parts: Sequence[Moments]) -> bool:
    """Bit by bit: the same kernel ran over them."""
    first = parts[0]
    return all(
        part.count == first.count and torch.equal(part.mean, first.mean) and torch.equal(part.variance, first.variance)
        for part in parts
    )


def with_frozen_statistics(loss_fn: LossFn, inputs: InputDependence | None = None) -> LossFn:
    """`loss_fn` with fixed statistics; `inputs` is told the values per channel of calls that normalize by the batch."""

    def run(model: nn.Module, batch: Any) -> LossOutput:
        names = {} if inputs is None else inputs.names
        counts: list[tuple[str, int]] = []

        def normalized(call: BatchNormCall, layer: str) -> Tensor | None:
            name = names.get(id(call.running_mean))
            if name is None and not call.training:
                return None
            counts.append((name or layer, call.input.numel() // max(1, call.input.shape[1])))
            return call.with_frozen_statistics()

        mode = BatchNormMode(normalized)
        try:
            with eagerly(), mode:
                output = loss_fn(model, batch)
        finally:
            mode.uncount()
        if inputs is not None:
            inputs.note(batch, counts)
        return output

    return run


def eagerly() -> AbstractContextManager[Any]:
    """Compiled modules run as they were written, where BatchNorm can be intercepted."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
