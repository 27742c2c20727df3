"""A plan: which micro-batches of a global batch fit a memory budget, before anything is run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from gradfold.batch.nesting import Batch
from gradfold.distributed.fsdp import sharded_modules
from gradfold.engine.model_checks import refuse_lazy
from gradfold.errors import DoesNotFitError, OptionError
from gradfold.memory.budget import Budget, Margin, margin_for, read_bytes, written
from gradfold.memory.dry_run import DryRun, Planned
from gradfold.memory.estimate import PeakEstimate
from gradfold.memory.tracker import MemoryBreakdown, highest
from gradfold.precision import Precision

__all__ = ["Plan", "PlanRow", "plan"]


@dataclass(frozen=True)
class PlanRow:
    """One micro-batch size."""

    micro_batch_size: int
    num_micro_batches: int
    peak_bytes: int  # of tensors, predicted
    breakdown: MemoryBreakdown  # bytes of tensors when most are in use, by what they are for
    by_phase: Mapping[str, MemoryBreakdown]  # the same for "forward and backward" and for "update"
    needed_bytes: int  # the peak with the margin
    fits: bool
    saving: str = ""  # what was changed to save memory; empty where nothing was
    cost: str = ""  # of the saving, with the line that makes the change

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """What fits."""

    choice: PlanRow  # the largest micro-batch that fits, with nothing changed
    rows: tuple[PlanRow, ...]  # powers of two and the choice; then the largest size with each saving that changes it
    num_rows: int  # of the global batch
    budget_bytes: int
    margin: Margin  # what was added to predictions
    device: str
    source: str  # "fake tensors" or "probes" (real runs of few rows)
    notes: tuple[str, ...]  # what to know about the numbers
    elapsed_s: float

    @property
    def micro_batch_size(self) -> int:
        """The choice, as `Accumulator(micro_batch_size=...)` takes it."""
        return self.choice.micro_batch_size

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"micro_batch_size": self.micro_batch_size, **asdict(self)}

    def __str__(self) -> str:
        head = f"{'micro-batch':>11}  {'how many':>8}  {'peak':>10}  {'with margin':>11}  fits"
        lines = [
            f"{row.micro_batch_size:>11}  {row.num_micro_batches:>8}  {written(row.peak_bytes):>10}  "
            f"{written(row.needed_bytes):>11}  {'yes' if row.fits else 'no'}{'  with ' * bool(row.saving)}{row.saving}"
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

    A window and an update run on fake tensors, which take no memory, at two small sizes. Their memory is linear in the
    rows, operator by operator, and so known for every size. Models that cannot run so, and recurrent ones, are run on a
    few real rows, in a copy, and the plan says so. With `collate`, the longest sample of the batch stands for all.

    Args:
        accumulator: as it is used for training.
        batch: what `accumulator.backward(batch)` takes, but for a window; its rows are the global batch.
        optimizer: steps after each window. None leaves its state and the update out of the prediction.
        memory: the budget, such as "16GiB" or a number of bytes; for the whole process, or the whole device.
        device: None: that of the model; "cuda": also on a machine without a GPU, as well as can be known.
        margin: the share that is added to predictions. None: 10 %.

    Raises:
        DoesNotFitError: one row does not fit; with its peak, and what would reduce it.
        OptionError: an argument cannot work.
        BatchError: the batch cannot be split by rows.
        ModelError: the model can run neither on fake tensors nor in a copy, has lazy layers that have not run, or is on
            a device that hides its memory; or batch_norm="exact" or a TwoPhaseLoss couples the samples of a batch that
            does not fit at once, whose micro-batches cannot be predicted.

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
    target = _device(device, accumulator.model)
    budget = Budget(read_bytes(memory), margin_for(target, margin, is_process_there=False))
    dry_run = DryRun.of(accumulator, batch, optimizer)
    estimate = PeakEstimate(dry_run, target)
    size = estimate.solve(budget.has_room_for)
    if size is None:
        raise _does_not_fit(_row(estimate, 1, budget), budget, _rows_with_savings(dry_run, target, budget))
    powers = {2**power for power in range(estimate.num_rows.bit_length())}
    sizes = {estimate.num_rows, size} | (set() if dry_run.coupling else powers)
    rows = [_row(estimate, rows_at_once, budget) for rows_at_once in sorted(sizes)]
    choice = next(row for row in rows if row.micro_batch_size == size)
    if size < estimate.num_rows:
        rows += [row for row in _rows_with_savings(dry_run, target, budget) if row.micro_batch_size != size]
    assert budget.num_bytes is not None
    return Plan(
        choice=choice,
        rows=tuple(rows),
        num_rows=estimate.num_rows,
        budget_bytes=budget.num_bytes,
        margin=budget.margin,
        device=str(target),
        source=estimate.source,
        notes=tuple(_notes(estimate, dry_run, target, budget.margin)),
        elapsed_s=time.perf_counter() - since,
    )


def _row(estimate: PeakEstimate, size: int, budget: Budget) -> PlanRow:
    by_phase = estimate.peaks(size)
    breakdown = highest(by_phase.values())
    num_micro_batches, needed = -(-estimate.num_rows // size), budget.needed_bytes(breakdown)
    fits = budget.has_room_for(breakdown)
    return PlanRow(size, num_micro_batches, breakdown.total, breakdown, by_phase, needed, fits)


def _rows_with_savings(dry_run: DryRun, device: torch.device, budget: Budget) -> Iterator[PlanRow]:
    """The largest size with each saving; those that cannot be run are left out."""
    for name, cost, changed in _savings(dry_run, device):
        with suppress(Exception):  # a model that does not run so, in some way of its own
            estimate = PeakEstimate(changed, device)
            row = _row(estimate, estimate.solve(budget.has_room_for) or 1, budget)
            yield replace(row, saving=name, cost=cost)


def _savings(dry_run: DryRun, device: torch.device) -> Iterator[tuple[str, str, DryRun]]:
    """Changes that take less memory on this device, each with what it costs and the line that makes it."""
    model, precision = dry_run.model, dry_run.precision
    dtypes = {parameter.dtype for parameter in model.parameters()}
    layers = longest_list(model)
    if layers is not None:
        name = f"checkpoint {layers}"
        cost = f"each module of {layers!r} runs twice: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)"
        yield name, cost, replace(dry_run, checkpointed=layers)
    if precision.compute is None and torch.float32 in dtypes:
        cost = 'activations are rounded to 8 bits: precision="bf16"'
        yield "bf16 autocast", cost, replace(dry_run, precision=replace(precision, compute=torch.bfloat16))
    if precision.accumulate_dtype is not None and dtypes & {torch.bfloat16, torch.float16}:
        cost = (
            "gradients are summed in the parameters' own dtype, off by 1 % over 128 micro-batches: "
            "precision=Precision(accumulate_dtype=None)"
        )
        yield "narrow sums", cost, replace(dry_run, precision=Precision(precision.compute, accumulate_dtype=None))
    if sharded_modules(list(model.modules())):
        if dry_run.reduces_once:
            name, option = "reduce every time", "per_micro_batch"
            cost = "gradients are reduced once per micro-batch, and no rank keeps whole ones"
        else:
            name, option = "reduce once", "per_window"
            cost = "gradients are reduced once per window, and each rank keeps whole ones until then"
        yield name, f'{cost}: fsdp_reduce="{option}"', replace(dry_run, reduces_once=not dry_run.reduces_once)
    if device.type != "cpu":
        cost = "saved tensors travel to the host and back: with torch.autograd.graph.save_on_cpu(pin_memory=True)"
        yield "offload saved tensors", cost, replace(dry_run, is_offloading=True)


def longest_list(model: nn.Module) -> str | None:
    """The name of the `nn.ModuleList` or `nn.Sequential` inside the model whose modules hold most parameters.

    Those of one kind and more than one, as the layers of a network are; None where there is none.
    """
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1 and name:
            kinds = {type(one) for one in module}
            if len(kinds) == 1 and all(any(True for _ in one.children()) for one in module):
                found[name] = sum(one.numel() for one in module.parameters())
    return max(found, key=lambda name: found[name], default=None)


def _does_not_fit(row: PlanRow, budget: Budget, with_savings: Iterator[PlanRow]) -> DoesNotFitError:
    """The error where not even one row fits: what its memory is for, and what would reduce it."""
    parts = sorted(((size, kind) for kind, size in asdict(row.breakdown).items()), reverse=True)
    made_up = ", ".join(
        f"{kind.replace('_', ' ')} {written(size)}" for size, kind in parts if size >= 0.01 * row.peak_bytes
    )
    helping = [
        f"{one.saving} ({written(one.needed_bytes)} for {one.micro_batch_size} "
        f"row{'s' * (one.micro_batch_size > 1)}, {'fits' if one.fits else 'does not fit either'}; {one.cost})"
        for one in with_savings
        if one.fits or one.needed_bytes < 0.98 * row.needed_bytes
    ]
    return DoesNotFitError(
        f"not even one row fits into {written(budget.num_bytes or 0)}: its tensors take {written(row.peak_bytes)} at "
        f"their peak ({made_up}), and with the margin {written(row.needed_bytes)} are needed. What would reduce it: "
        f"{'; '.join([*helping, _ADVICE[parts[0][1]]])}.",
        (1,),
    )


def _notes(estimate: PeakEstimate, dry_run: DryRun, device: torch.device, margin: Margin) -> Iterator[str]:
    if dry_run.coupling:
        yield f"Only the whole batch at once can be predicted with {dry_run.coupling}."
    if estimate.source == "probes":
        yield f"Run on a few real rows, in a copy, since {estimate.reason}."
    if dry_run.optimizer is None:
        yield "Without optimizer= its state and the update are not in the numbers."
    if device.type == "cuda" and not torch.cuda.is_available():
        yield "Planned for a GPU that is not there, from the operators of a CPU."
    yield f"The margin of {margin} is for what cannot be known: {'; '.join(margin.unknown)}."


_ADVICE = {
    "parameters": "a smaller model, or fully_shard over more processes",
    "gradients": "parameters that are frozen, or fully_shard over more processes",
    "optimizer_state": "an optimizer with less state (SGD has none, Adam two tensors per parameter)",
    "saved_activations": "activation checkpointing, or shorter samples",
    "temporaries": "a fused optimizer (fused=True) where the update is the peak, or shorter samples",
    "inputs": "a smaller global batch on the host",
}


def _device(device: str | torch.device | None, model: nn.Module) -> torch.device:
    if device is None:
        return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise OptionError(f"device={device!r} is not a device: {error}") from None
    if asked.type not in ("cpu", "cuda"):
        raise OptionError(f"device={str(asked)!r}; plans are for 'cpu' and 'cuda'.")
    return asked
