"""A plan: which micro-batches of a global batch fit a memory budget, before anything is run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from gradfold.batch.nesting import Batch
from gradfold.batch.split import Collate
from gradfold.distributed.ddp import DistributedOption
from gradfold.engine.loss_terms import LossFn
from gradfold.engine.model_checks import refuse_lazy
from gradfold.errors import DoesNotFitError, OptionError
from gradfold.memory.amount import Margin, margin_for, read_bytes, written
from gradfold.memory.dry_run import Program, Rehearsal
from gradfold.memory.estimate import PeakEstimate, largest_that_fits
from gradfold.memory.probe_batch import ProbeBatch
from gradfold.memory.savings import MemorySaving, levers_of
from gradfold.memory.trace import KINDS, MemoryBreakdown
from gradfold.precision import Precision

__all__ = ["Plan", "PlanRow", "plan"]

_CHECKS = 3  # of a choice by a run of its own size


class Planned(Protocol):
    """What a plan reads of an `Accumulator`, which knows plans and so cannot be known here."""

    model: nn.Module
    loss_fn: LossFn
    collate: Collate | None
    precision: Precision
    ranks: DistributedOption


@dataclass(frozen=True)
class PlanRow:
    """One micro-batch size.

    Attributes:
        micro_batch_size: rows that are run at once.
        num_micro_batches: to an update.
        make_up: bytes of tensors when most are in use, by what they are for.
        by_phase: the same for "forward and backward" and for "update".
        needed_bytes: the peak with the margin.
        fits: whether that is within the budget.
        lever: what was changed about the program; empty where it is as given.
        price: of the lever, and how to pull it.
    """

    micro_batch_size: int
    num_micro_batches: int
    make_up: MemoryBreakdown
    by_phase: Mapping[str, MemoryBreakdown]
    needed_bytes: int
    fits: bool
    lever: str = ""
    price: str = ""

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of tensors."""
        return self.make_up.total

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "num_micro_batches": self.num_micro_batches,
            "peak_bytes": self.peak_bytes,
            "make_up": self.make_up.to_json(),
            "by_phase": {phase: found.to_json() for phase, found in self.by_phase.items()},
            "needed_bytes": self.needed_bytes,
            "fits": self.fits,
            "lever": self.lever,
            "price": self.price,
        }


@dataclass(frozen=True)
class Plan:
    """What fits.

    Attributes:
        choice: the largest micro-batch that fits, of the program as it is.
        rows: the table: sizes in powers of two and the choice; then the largest size with each lever that changes it.
        num_rows: of the global batch.
        budget_bytes: what was to be kept.
        margin: what was added to predictions.
        device: what was planned for.
        source: "fake tensors" or "probes" (real runs of few rows).
        notes: what to know about the numbers.
        elapsed_s: seconds that it took.
    """

    choice: PlanRow
    rows: tuple[PlanRow, ...]
    num_rows: int
    budget_bytes: int
    margin: Margin
    device: str
    source: str
    notes: tuple[str, ...]
    elapsed_s: float

    @property
    def micro_batch_size(self) -> int:
        """The choice, as `Accumulator(micro_batch_size=...)` takes it."""
        return self.choice.micro_batch_size

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "micro_batch_size": self.micro_batch_size,
            "choice": self.choice.to_json(),
            "rows": [row.to_json() for row in self.rows],
            "num_rows": self.num_rows,
            "budget_bytes": self.budget_bytes,
            "margin": self.margin.to_json(),
            "device": self.device,
            "source": self.source,
            "notes": list(self.notes),
            "elapsed_s": self.elapsed_s,
        }

    def __str__(self) -> str:
        head = f"{'micro-batch':>11}  {'how many':>8}  {'peak':>10}  {'with margin':>11}  fits"
        lines = [
            f"{row.micro_batch_size:>11}  {row.num_micro_batches:>8}  {written(row.peak_bytes):>10}  "
            f"{written(row.needed_bytes):>11}  {'yes' if row.fits else 'no'}{'  with ' * bool(row.lever)}{row.lever}"
            for row in self.rows
        ]
        return "\n".join([head, *lines, f"choice: {self.micro_batch_size}", *self.notes])


def plan(
    accumulator: Planned,
    batch: Batch,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    memory: int | str,
    device: str | torch.device | None = None,
    margin: float | None = None,
) -> Plan:
    """Predict which micro-batches of a batch fit into memory, without running them.

    A window and an update run on fake tensors, which take no memory, at two small sizes. Their course of memory is
    linear in the rows, operator by operator, and so known for every size. Models that cannot run so, and recurrent
    ones, are run on a few real rows, in a copy, and the plan says so. Where `collate` is given, the longest sample of
    the batch stands for all.

    Args:
        accumulator: as it is used for training.
        batch: what `accumulator.backward(batch)` takes, no window; its rows are the global batch.
        optimizer: what steps then. None leaves its state and the update out of the prediction.
        memory: the budget, such as "16GiB" or a number of bytes; for the whole process, or the whole device.
        device: None: that of the model; "cuda": also where there is none, as well as can be known.
        margin: the share that is added to predictions. None: 10 %.

    Returns:
        The plan; print it, or take `plan(...).micro_batch_size`.

    Raises:
        DoesNotFitError: one row does not fit; with its peak, and what would reduce it.
        OptionError: an argument cannot work.
        BatchError: the batch cannot be cut by rows.
        ModelError: the model can run neither on fake tensors nor in a copy, or has lazy layers that have not run.

    >>> import torch, gradfold
    >>> model = torch.nn.Sequential(torch.nn.Linear(1000, 4000), torch.nn.ReLU(), torch.nn.Linear(4000, 10))
    >>> def loss_fn(model, batch):
    ...     return torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
    >>> accumulator = gradfold.Accumulator(model, loss_fn)
    >>> batch = {"x": torch.randn(16384, 1000), "labels": torch.randint(0, 10, (16384,))}
    >>> found = gradfold.plan(accumulator, batch, torch.optim.Adam(model.parameters()), memory="1GiB")
    >>> 4096 < found.micro_batch_size < 16384
    True
    """
    since = time.perf_counter()
    refuse_lazy(accumulator.model, "gradfold.plan")
    budget = read_bytes(memory)
    target = _device(device, accumulator.model)
    specimen = ProbeBatch(batch, accumulator.collate)
    program = Rehearsal(
        *(accumulator.model, accumulator.loss_fn, specimen, optimizer, accumulator.precision),
        reduces_once=accumulator.ranks == "reduce_once",
    )
    held_back = margin_for(target, margin, is_process_there=False)
    table = _Table(specimen.num_rows, budget, held_back)
    prediction = PeakEstimate(program, target)
    size = table.solve(prediction)
    if size is None:
        raise _does_not_fit(table, prediction, program, target, budget)
    rows = [table.row(prediction, rows_at_once) for rows_at_once in _sizes(specimen.num_rows, size)]
    if size < specimen.num_rows:
        rows += [row for row in _with_levers(table, program, target) if row.micro_batch_size != size]
    return Plan(
        choice=table.row(prediction, size),
        rows=tuple(rows),
        num_rows=specimen.num_rows,
        budget_bytes=budget,
        margin=held_back,
        device=str(target),
        source=prediction.source,
        notes=tuple(_notes(prediction, program, held_back, target)),
        elapsed_s=time.perf_counter() - since,
    )


class _Table:
    """Rows of a plan under one budget."""

    def __init__(self, num_rows: int, budget_bytes: int, margin: Margin) -> None:
        self._num_rows = num_rows
        self._budget_bytes = budget_bytes
        self._margin = margin

    def row(self, prediction: PeakEstimate, size: int, lever: MemorySaving | None = None) -> PlanRow:
        """The row of a size."""
        by_phase = prediction.peaks(size)
        make_up = max(by_phase.values(), key=lambda found: found.total)
        needed = self._margin.with_margin(make_up.total)
        how_many = -(-self._num_rows // size)
        fits = needed <= self._budget_bytes
        names = ("", "") if lever is None else (lever.name, lever.price)
        return PlanRow(size, how_many, make_up, by_phase, needed, fits, *names)

    def solve(self, prediction: PeakEstimate) -> int | None:
        """The largest size that fits, checked by a run of its own size."""
        size = None
        for _ in range(_CHECKS):
            size = largest_that_fits(lambda size: self.row(prediction, size).fits, self._num_rows)
            if size is None or prediction.check(size):
                break
        return size


def _sizes(num_rows: int, choice: int) -> list[int]:
    powers = {2**power for power in range(num_rows.bit_length()) if 2**power <= num_rows}
    return sorted(powers | {num_rows, choice})


def _with_levers(table: _Table, program: Program, device: torch.device) -> Iterator[PlanRow]:
    """The largest size with each lever; those that cannot be run are left out."""
    for lever in levers_of(program, device):
        try:
            prediction = PeakEstimate(lever.program, device)
            size = table.solve(prediction) or 1
            yield table.row(prediction, size, lever)
        except Exception:  # a model that does not run so, in some way of its own
            continue


def _does_not_fit(
    table: _Table, prediction: PeakEstimate, program: Program, device: torch.device, budget: int
) -> DoesNotFitError:
    row = table.row(prediction, 1)
    parts = sorted(((row.make_up.to_json()[kind], kind) for kind in KINDS), reverse=True)
    made_up = ", ".join(
        f"{kind.replace('_', ' ')} {written(size)}" for size, kind in parts if size >= 0.01 * row.peak_bytes
    )
    helping = [
        f"{one.lever} ({written(one.needed_bytes)} for {one.micro_batch_size} row{'s' * (one.micro_batch_size > 1)}, "
        f"{'fits' if one.fits else 'does not fit either'}; {one.price})"
        for one in _with_levers(table, program, device)
        if one.fits or one.needed_bytes < 0.98 * row.needed_bytes
    ]
    advice = [*helping, _ADVICE[parts[0][1]]]
    return DoesNotFitError(
        f"not even one row fits into {written(budget)}: its tensors take {written(row.peak_bytes)} at their peak "
        f"({made_up}), and with the margin {written(row.needed_bytes)} are needed. What would reduce it: "
        f"{'; '.join(advice)}.",
        (1,),
    )


_ADVICE = {
    "parameters": "a smaller model, or fully_shard over more processes",
    "gradients": "parameters that are frozen, or fully_shard over more processes",
    "optimizer_state": "an optimizer with less state (SGD has none, Adam two tensors per parameter)",
    "saved_activations": "activation checkpointing, or shorter samples",
    "temporaries": "a fused optimizer (fused=True) where the update is the peak, or shorter samples",
    "inputs": "a smaller global batch on the host",
}


def _notes(prediction: PeakEstimate, program: Program, margin: Margin, device: torch.device) -> Iterator[str]:
    if prediction.source == "probes":
        yield f"Run on a few real rows, in a copy, since {prediction.reason}."
    if program.optimizer is None:
        yield "Without optimizer= its state and the update are not in the numbers."
    if device.type == "cuda" and not torch.cuda.is_available():
        yield "Planned for a GPU that is not there, from the operators of a CPU."
    yield f"The margin of {margin} is for what cannot be known: {'; '.join(margin.unknown)}."


def _device(device: str | torch.device | None, model: nn.Module) -> torch.device:
    own = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device is None:
        return own
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device={device!r} is no device: {error}") from None
    if asked.type not in ("cpu", "cuda"):
        raise OptionError(f"device={str(asked)!r}; plans are for 'cpu' and 'cuda'.")
    return asked
