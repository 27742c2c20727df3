"""An estimate: the peak memory of a window and its update for any micro-batch size, from dry runs at two sizes.

The same program runs whatever the size: two traces agree event by event, and the bytes of each storage are linear in
the rows. So the peak of every size is exact, wherever it moves to. Where traces differ, each size asked about is run.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from functools import cache

import torch
from torch import nn

from gradfold.engine.recovery import release_memory
from gradfold.errors import ModelError, is_out_of_memory
from gradfold.memory.budget import written
from gradfold.memory.dry_run import DryRun, round_up
from gradfold.memory.tracker import (
    BACKWARD,
    UPDATE,
    AllocationTrace,
    MemoryBreakdown,
    highest,
    refuse_unseen,
    storage_bytes,
)
from gradfold.messages import first_line

_ROWS = 8  # of the larger run on fake tensors; one row alone may take another way (`squeeze`, BatchNorm)
_PROBE_ROWS = 16  # fused kernels pad what they keep, which shows less in more rows
_BLOCK = 512  # bytes, in which CUDA's caching allocator hands out memory
_TOLERANCE = 1e-3


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number from 1 to `most` that fits, where everything below one that fits does too.

    `most` comes first: a whole batch at once needs less than two halves (no gradient is there yet to add to).

    >>> largest_that_fits(lambda rows: 3 * rows <= 100, 128)
    33
    >>> largest_that_fits(lambda rows: False, 128) is None
    True
    """
    if most >= 1 and fits(most):
        return most
    return bisect_left(range(1, most), True, key=lambda size: not fits(size)) or None


class PeakEstimate:
    """What a window and its update take on a device (a CUDA device need not be there), for every size.

    From fake tensors, or from probes, which are real runs of few rows; ModelError where neither can run.
    """

    def __init__(self, dry_run: DryRun, device: torch.device) -> None:
        refuse_unseen(dry_run.model.parameters())
        self._dry_run = replace(dry_run, as_on_cuda=device.type == "cuda")
        self._is_on_host = device.type == "cpu"
        self._block = _BLOCK if device.type == "cuda" else 1
        self.num_rows = dry_run.probe_batch.num_rows  # of the global batch
        self._pair = cache(self._run_two)
        self._run = cache(self._dry_run.run)
        self._is_linear = True
        self.source, self.reason = "fake tensors", ""  # why probes had to be run
        if any(isinstance(module, nn.RNNBase) for module in dry_run.model.modules()):
            self.reason = "recurrent layers run in one fused operator, which saves other tensors than fake ones show"
        else:
            try:
                self._pair(self._num_micro_batches(1))
                return
            except Exception as error:
                self.reason = f"it does not run on fake tensors ({first_line(error)})"
        self.source = "probes"
        try:
            self._pair(self._num_micro_batches(1))
        except Exception as error:
            raise ModelError(
                f"the memory of {type(dry_run.model).__name__} cannot be predicted: {self.reason}, and real runs of a "
                f"few rows on a copy fail: {first_line(error)}. Pass micro_batch_size= a number, and measure it with "
                "gradfold.measure_peak(lambda: step(batch))."
            ) from error

    def peaks(self, size: int) -> Mapping[str, MemoryBreakdown]:
        """The breakdown when most is in use, by phase."""
        num_micro_batches = self._num_micro_batches(size)
        at, traces = self._pair(num_micro_batches)
        if self.source == "fake tensors" and not (self._is_linear and traces[0] == traces[1]):
            at, traces = (size, size), [self._run(size, num_micro_batches, is_fake=True)] * 2  # which stands for both

        def read(low: int, high: int) -> int:
            """What is `low` and `high` in the two traces."""
            step = (size - at[0]) / (at[1] - at[0]) if at[1] > at[0] else 0.0
            return max(round(low + (high - low) * step), 0)

        first, second = traces
        held, per_row = read(first.held_metrics, second.held_metrics), read(first.row_metrics, second.row_metrics)
        if first == second:
            pairs = zip(first.num_bytes, second.num_bytes, strict=True)
            peaks = first.peaks([round_up(read(*pair), self._block) for pair in pairs])
        else:  # from the peaks of the phases alone, which miss a peak that moves
            ends = second.peaks()
            peaks = {
                phase: MemoryBreakdown(*map(read, astuple(low), astuple(ends[phase])))
                for phase, low in first.peaks().items()
            }
        probe_batch = self._dry_run.probe_batch
        inputs = probe_batch.host_bytes(size) if self._is_on_host else probe_batch.device_bytes(size, self._block)
        buffers = self._dry_run.buffer_bytes(-(-self.num_rows // size))
        peaks = {
            phase: replace(found, inputs=found.inputs + inputs, temporaries=found.temporaries + buffers)
            for phase, found in peaks.items()
        }
        return self._with_metrics(peaks, size, held, per_row) if held or per_row else peaks

    def peak(self, size: int) -> MemoryBreakdown:
        """The breakdown when most is in use."""
        return highest(self.peaks(size).values())

    def check(self, size: int) -> bool:
        """Whether the lines hold at a size; where they are off by more than 0.1 %, every size is run from here on."""
        if self.source == "probes" or not self._is_linear:
            return True
        fitted = self.peak(size).total
        self._is_linear = False
        exact = self.peak(size).total
        self._is_linear = abs(fitted - exact) <= _TOLERANCE * exact
        return self._is_linear

    def solve(self, fits: Callable[[MemoryBreakdown], bool]) -> int | None:
        """The largest size whose peak fits, checked by a dry run of that size; None where not even one row does.

        Raises:
            ModelError: samples are coupled, and the whole batch does not fit: no smaller size can be predicted.
        """
        least, coupling = self.num_rows if self._dry_run.coupling else 1, self._dry_run.coupling
        while True:
            size = largest_that_fits(lambda size: size >= least and fits(self.peak(size)), self.num_rows)
            if size is None or self.check(size):  # a check that fails is the last: from there on every size is run
                break
        if size is None and coupling:
            raise ModelError(
                f"the memory of micro-batches cannot be predicted with {coupling}: what they keep for the whole batch "
                f"is not in a dry run of one. All {self.num_rows} rows at once take "
                f"{written(self.peak(self.num_rows).total)} without a margin, which do not fit. Pass micro_batch_size= "
                "a number, and measure it with gradfold.measure_peak(lambda: step(batch))."
            )
        return size

    def _with_metrics(
        self, peaks: dict[str, MemoryBreakdown], size: int, held: int, per_row: int
    ) -> dict[str, MemoryBreakdown]:
        """With the metrics that are kept and concatenated: of one micro-batch `held` bytes, `per_row` by row."""
        held_by_all, concatenated = (round(one * self.num_rows / size) for one in (held, per_row))
        last = peaks[BACKWARD]
        more = max(held_by_all - self._num_micro_batches(size) * held, 0)
        end = replace(
            last,
            gradients=storage_bytes(one for one in self._dry_run.model.parameters() if one.requires_grad),
            saved_activations=held_by_all,
            temporaries=concatenated,
        )
        last = replace(last, saved_activations=last.saved_activations + more)
        found = peaks | {BACKWARD: highest([last, end])}
        if UPDATE in peaks:
            found[UPDATE] = replace(peaks[UPDATE], temporaries=peaks[UPDATE].temporaries + concatenated)
        return found

    def _num_micro_batches(self, size: int) -> int:
        """Of those that differ in memory: the first finds no gradient to add to, the last may reduce it."""
        return min(3 if self._dry_run.reduces_once else 2, -(-self.num_rows // size))

    def _run_two(self, num_micro_batches: int) -> tuple[Sequence[int], list[AllocationTrace]]:
        """Traces at two sizes, and these sizes."""
        is_fake = self.source == "fake tensors"
        high = min(_ROWS if is_fake else _PROBE_ROWS, self.num_rows)
        while True:
            sizes = max(high // 2, 1), high
            try:
                return sizes, [self._dry_run.run(size, num_micro_batches, is_fake=is_fake) for size in sizes]
            except Exception as error:
                if is_fake or high < 2 or not is_out_of_memory(error):
                    raise
            high //= 2
            release_memory(next(self._dry_run.model.parameters()).device)
