"""A prediction: the peak memory of a window and its update for any micro-batch size, from runs at two sizes.

The same program runs whatever the size, so that the ledgers of two sizes agree entry by entry, and the bytes of each
entry are linear in the number of rows. So the whole course of memory is known for every size, and its peak, wherever it
moves to, is exact. Where ledgers do not agree, fake tensors are run at each size that is asked about.

The largest size that fits: how far rows, tokens or anything else counted can go under a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import nn

from gradfold.engine.recovery import give_back
from gradfold.errors import ModelError, is_out_of_memory
from gradfold.memory.dry_run import Program
from gradfold.memory.probe_batch import storage_bytes
from gradfold.memory.trace import AllocationTrace, MemoryBreakdown
from gradfold.memory.tracker import BACKWARD, UPDATE

__all__: list[str] = []


def largest_that_fits(fits: Callable[[int], bool], most: int, least: int = 1) -> int | None:
    """The largest number from `least` to `most` that fits, where everything below one that fits does too.

    Asks about log2(most - least) numbers, `most` first: often all of it fits, and a whole batch at once needs less than
    two halves (no gradient is there yet that its own would be added to).

    >>> largest_that_fits(lambda rows: 3 * rows <= 100, 128)
    33
    >>> largest_that_fits(lambda rows: False, 128) is None
    True
    """
    if least <= most and fits(most):
        return most
    if least >= most or not fits(least):
        return None
    low, high = least, most  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


_ROWS = 8  # of the larger run on fake tensors; one row alone may take another way (`squeeze`, BatchNorm)
_PROBE_ROWS = 16  # fused kernels pad what they keep, which shows less in more rows
_BLOCK = 512  # bytes, in which CUDA's caching allocator hands out memory


@dataclass(frozen=True)
class LinearFit:
    """How memory goes up and down for two sizes of one program."""

    sizes: tuple[int, int]
    ledgers: tuple[AllocationTrace, AllocationTrace]

    @property
    def is_linear(self) -> bool:
        """Whether the ledgers agree, so that lines can be drawn through them."""
        return self.ledgers[0].agrees_with(self.ledgers[1])

    def peaks(self, size: int, round_up: Callable[[int], int]) -> dict[str, MemoryBreakdown]:
        """By phase, for a size, where the ledgers agree."""
        first, second = self.ledgers
        step = self._step(size)
        pairs = zip(first.num_bytes, second.num_bytes, strict=True)
        return first.peaks([round_up(max(round(a + (b - a) * step), 0)) for a, b in pairs])

    def peaks_of_phases(self, size: int) -> dict[str, MemoryBreakdown]:
        """By phase, from the peaks of the phases alone, which miss a peak that moves."""
        first, second = (ledger.peaks() for ledger in self.ledgers)
        step = self._step(size)
        found = {}
        for phase, low in first.items():
            high = second[phase].to_json()
            found[phase] = MemoryBreakdown(
                **{k: max(round(a + (high[k] - a) * step), 0) for k, a in low.to_json().items()}
            )
        return found

    def metrics(self, size: int) -> tuple[int, int]:
        """What stays in use for the metrics of a micro-batch, and those with an entry per row; in bytes."""
        first, second = ((ledger.held_metrics, ledger.row_metrics) for ledger in self.ledgers)
        step = self._step(size)
        held, rows = (max(round(a + (b - a) * step), 0) for a, b in zip(first, second, strict=True))
        return held, rows

    def _step(self, size: int) -> float:
        low, high = self.sizes
        return (size - low) / (high - low) if high > low else 0.0


class PeakEstimate:
    """What a program takes, for every size.

    Args:
        program: what is run.
        device: where it is to run; "cuda" may be a device that is not there.

    Attributes:
        num_rows: of the global batch.
        source: "fake tensors" or "probes", which are real runs of few rows.
        reason: why probes had to be run.

    Raises:
        ModelError: neither fake tensors nor probes can run.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self._program = replace(program, as_on_cuda=device.type == "cuda")
        self._is_on_host = device.type == "cpu"
        self._round_up = as_blocks if device.type == "cuda" else as_it_is
        self.num_rows = program.specimen.num_rows
        self.source, self.reason = "fake tensors", _needs_probes(program.model, device)
        self._course = cache(self._run_two)
        self._exact = cache(self._program.run_fake)
        self._is_linear = True
        if not self.reason:
            try:
                self._course(self._num_micro_batches(1))
                return
            except Exception as error:
                self.reason = f"it does not run on fake tensors ({_first_line(error)})"
        self.source = "probes"
        try:
            self._course(self._num_micro_batches(1))
        except Exception as error:
            raise ModelError(
                f"the memory of {type(program.model).__name__} cannot be predicted: {self.reason}, and real runs of a "
                f"few rows on a copy fail: {_first_line(error)}. Give micro_batch_size= a number, and measure it with "
                "gradfold.measure_peak(lambda: step(batch))."
            ) from error

    def peaks(self, size: int) -> Mapping[str, MemoryBreakdown]:
        """The make-up when most is in use, by phase."""
        num_micro_batches = self._num_micro_batches(size)
        course = self._course(num_micro_batches)
        metrics = course.metrics(size)
        if self._is_linear and course.is_linear:
            peaks = course.peaks(size, self._round_up)
        elif self.source == "probes":
            peaks = course.peaks_of_phases(size)
        else:
            ledger = self._exact(size, num_micro_batches)
            metrics = ledger.held_metrics, ledger.row_metrics
            peaks = ledger.peaks([self._round_up(num_bytes) for num_bytes in ledger.num_bytes])
        inputs = self._input_bytes(size)
        kept = self._program.buffer_bytes(-(-self.num_rows // size))
        peaks = {
            phase: replace(found, inputs=found.inputs + inputs, temporaries=found.temporaries + kept)
            for phase, found in peaks.items()
        }
        return self._with_metrics(peaks, size, *metrics)

    def _with_metrics(
        self, peaks: dict[str, MemoryBreakdown], size: int, held: int, of_rows: int
    ) -> dict[str, MemoryBreakdown]:
        """With the metrics that micro-batches beyond those run keep, those joined at the end, and for the update.

        `held` and `of_rows` are bytes of one micro-batch, as `LinearFit.metrics` gives them.
        """
        if not held and not of_rows:
            return peaks
        held_by_all = round(held * self.num_rows / size)
        joined = round(of_rows * self.num_rows / size)
        last = peaks[BACKWARD]
        more = max(held_by_all - self._num_micro_batches(size) * held, 0)
        end = MemoryBreakdown(
            parameters=last.parameters,
            gradients=storage_bytes(one for one in self._program.model.parameters() if one.requires_grad),
            optimizer_state=last.optimizer_state,
            saved_activations=held_by_all,
            temporaries=joined,
            inputs=last.inputs,
        )
        last = replace(last, saved_activations=last.saved_activations + more)
        found = peaks | {BACKWARD: max(last, end, key=lambda make_up: make_up.total)}
        if UPDATE in peaks:
            found[UPDATE] = replace(peaks[UPDATE], temporaries=peaks[UPDATE].temporaries + joined)
        return found

    def peak(self, size: int) -> MemoryBreakdown:
        """The make-up when most is in use."""
        return max(self.peaks(size).values(), key=lambda found: found.total)

    def check(self, size: int) -> bool:
        """Run a size on fake tensors; where lines miss it by more than 0.1 %, every size is run from here on.

        Returns:
            Whether the lines hold.
        """
        if self.source == "probes" or not self._is_linear:
            return True
        drawn = self.peak(size).total
        self._is_linear = False
        exact = self.peak(size).total
        self._is_linear = abs(drawn - exact) <= 1e-3 * exact
        return self._is_linear

    def _num_micro_batches(self, size: int) -> int:
        return min(self._program.num_unlike, -(-self.num_rows // size))

    def _run_two(self, num_micro_batches: int) -> LinearFit:
        if self.source == "fake tensors":
            return self._run_at(min(_ROWS, self.num_rows), num_micro_batches, self._program.run_fake)
        high = min(_PROBE_ROWS, self.num_rows)
        while True:
            try:
                return self._run_at(high, num_micro_batches, self._program.run_real)
            except Exception as error:
                if high < 2 or not is_out_of_memory(error):
                    raise
            high //= 2
            give_back(next(self._program.model.parameters()).device)

    def _run_at(self, high: int, num_micro_batches: int, run: Callable[[int, int], AllocationTrace]) -> LinearFit:
        low = max(high // 2, 1)
        return LinearFit((low, high), (run(low, num_micro_batches), run(high, num_micro_batches)))

    def _input_bytes(self, size: int) -> int:
        specimen = self._program.specimen
        return specimen.host_bytes(size) if self._is_on_host else specimen.device_bytes(size, self._round_up)


def as_it_is(num_bytes: int) -> int:
    """Memory as a CPU's allocator hands it out."""
    return num_bytes


def as_blocks(num_bytes: int) -> int:
    """Memory as CUDA's caching allocator hands it out."""
    return -(-num_bytes // _BLOCK) * _BLOCK


def _needs_probes(model: nn.Module, device: torch.device) -> str:
    """Why fake tensors would mislead; empty where they do not."""
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return "recurrent layers run in one fused operator, which saves other tensors than fake ones show"
    return ""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": ")
