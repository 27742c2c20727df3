"""The results of a comparison: what each arm measured, and how far it is from its reference.

An arm's process leaves gradients and weights in files, by the name of their parameter. Distances between the tensors of
two arms are computed in float64. `report.results_json` writes a `Comparison` as results.json.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradfold.compare.arms import ARMS, Arm
from gradfold.compare.data import Sizes
from gradfold.compare.measure import MeasuredMemory, Seconds
from gradfold.compare.settings import Settings
from gradfold.memory.auto import MicroBatchChoice
from gradfold.memory.budget import written
from gradfold.memory.measure import PeakMemory
from gradfold.verification.reference import differences


@dataclass(frozen=True)
class Curve:
    """Loss against samples seen; each point is a mean over a stretch of samples, placed at its middle."""

    samples: tuple[float, ...]
    loss: tuple[float, ...]

    def thinned(self, num_points: int) -> Curve:
        """The curve in at most about `num_points` points, each a mean over neighbors."""
        size = -(-len(self.loss) // num_points)
        stretches = [slice(start, start + size) for start in range(0, len(self.loss), size)]
        return Curve(*(tuple(fmean(values[one]) for one in stretches) for values in (self.samples, self.loss)))


@dataclass(frozen=True)
class Measured:
    """What the process of one arm measured."""

    num_updates: int
    num_samples: int  # over all epochs
    num_threads: int
    device: str
    seconds: Seconds  # without evaluation
    memory: MeasuredMemory
    final_loss: float  # the weighted mean over the last epoch
    metrics: Mapping[str, float]  # what the workload's `evaluate` returns after training
    curve: Curve
    notes: Mapping[str, str] = field(default_factory=dict)  # why something could not be measured, by its name
    num_skipped: int = 0  # updates that a loss scaler left out, since the scaled gradient had overflowed
    tracked: PeakMemory | None = None  # by what tensors are for, from updates of its own
    choice: MicroBatchChoice | None = None  # the micro-batch size that the arm tuned, where it was asked to

    @property
    def samples_per_s(self) -> float:
        """Samples trained on per second."""
        return self.num_samples / self.seconds.total if self.seconds.total else math.nan


@dataclass(frozen=True)
class Deviation:
    """How far something of an arm is from its reference's, relative to its size; or why there is no such number."""

    value: float | None
    note: str = ""

    def is_within(self, bound: float) -> bool:
        """Whether there is a number, and it is no larger than the bound."""
        return self.value is not None and self.value <= bound


@dataclass(frozen=True)
class Deviations:
    """How far an arm is from its reference, the full batch of the same model."""

    gradient_float32: Deviation  # of the first update, as it was run
    gradient_float64: Deviation  # the same, computed in float64
    last_window_float64: Deviation  # of an epoch's last, partial window, at the first weights, in float64
    weights: Deviation  # after training, relative to the distance that the full batch's have moved


@dataclass(frozen=True)
class Row:
    """One arm: what it measured and how far it is from its reference, or why it failed."""

    arm: str
    measured: Measured | None
    deviations: Deviations
    failure: str | None = None

    @property
    def description(self) -> str:
        """What the arm does."""
        return ARMS[self.arm].description

    @property
    def status(self) -> str:
        """Whether the arm ran to its end: "finished" or "failed"."""
        return "failed" if self.measured is None else "finished"

    @property
    def reference(self) -> str:
        """The arm from which the deviations of this one are measured."""
        return ARMS[self.arm].reference

    @property
    def is_reference(self) -> bool:
        """Whether other arms are measured from this one."""
        return self.arm == self.reference


@dataclass(frozen=True)
class WorkloadFacts:
    """What a reader should know about the workload."""

    name: str
    description: str
    batch_norm: str | None
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """Everything that one `gradfold compare` found."""

    settings: Settings
    sizes: Sizes
    workload: WorkloadFacts
    rows: tuple[Row, ...]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    command_line: str
    schema_version: int = 1

    @property
    def first_gradients_in(self) -> str:
        """The precision of the first gradients: as run, where arms with a lower precision are among them."""
        return "as run" if any(ARMS[row.arm].precision for row in self.rows) else "float32"

    @property
    def has_failures(self) -> bool:
        """Whether an arm failed."""
        return any(row.measured is None for row in self.rows)

    def row(self, arm: str) -> Row | None:
        """The row of an arm, if it was run."""
        return next((row for row in self.rows if row.arm == arm), None)

    def measured(self, arm: str) -> Measured | None:
        """What an arm measured, if it ran to its end."""
        row = self.row(arm)
        return None if row is None else row.measured


class Tensors:
    """The names of what an arm saves."""

    START: Final = "start"
    FINAL: Final = "final"
    GRADIENT_FLOAT32: Final = "gradient_float32"
    GRADIENT_FLOAT64: Final = "gradient_float64"
    LAST_WINDOW_FLOAT64: Final = "last_window_float64"


def save_parameters(model: nn.Module, folder: Path, name: str) -> None:
    """Save the weights."""
    _save({key: parameter.detach() for key, parameter in model.named_parameters()}, folder / f"{name}.pt")


def save_gradients(model: nn.Module, folder: Path, name: str) -> None:
    """Save `.grad` of every parameter that has one; a missing one counts as zero."""
    gradients = {key: p.grad.detach() for key, p in model.named_parameters() if p.grad is not None}
    dense = {key: grad.to_dense() if grad.is_sparse else grad for key, grad in gradients.items()}
    _save(dense, folder / f"{name}.pt")


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Save tensors; on a full disk, where torch does not name the cause, raise an `OSError` and leave no part."""
    try:
        torch.save(tensors, path)
    except (OSError, RuntimeError) as error:
        free = written(shutil.disk_usage(path.parent).free)
        path.unlink(missing_ok=True)
        raise OSError(f"cannot save {path.name} for the comparison, {free} free in {path.parent}") from error


def load(folder: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors, or None where the arm did not come so far."""
    path = folder / f"{name}.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """||left - right|| over all tensors in float64, where a missing one is zero."""
    norms = list(differences(left, right).values())
    return float(torch.tensor(norms, dtype=torch.float64).norm())


def deviations(name: str, folder: Path, measured: Mapping[str, Measured], sizes: Sizes) -> Deviations:
    """The deviations of an arm; `folder` holds a folder per arm, `measured` the arms that ran to their end."""
    arm = ARMS[name]
    if reason := _incomparable(arm, folder, measured):
        return Deviations(*[Deviation(None, reason)] * 4)
    notes = {**measured[arm.reference].notes, **measured[name].notes}

    def deviation(of: str, origin: dict[str, Tensor]) -> Deviation:
        own, reference = load(folder / name, of), load(folder / arm.reference, of)
        if own is None or reference is None:
            return Deviation(None, notes.get(of, "not measured"))
        return _relative(distance(own, reference), distance(reference, origin))

    no_last_window = "" if sizes.last_window else "all windows are full"
    if not arm.accumulates:
        no_last_window = "it has no windows"
    return Deviations(
        deviation(Tensors.GRADIENT_FLOAT32, {}),
        deviation(Tensors.GRADIENT_FLOAT64, {}),
        Deviation(None, no_last_window) if no_last_window else deviation(Tensors.LAST_WINDOW_FLOAT64, {}),
        deviation(Tensors.FINAL, load(folder / arm.reference, Tensors.START) or {}),
    )


def _incomparable(arm: Arm, folder: Path, measured: Mapping[str, Measured]) -> str:
    """Why nothing of an arm can be compared with its reference, or an empty text."""
    if arm.name not in measured:
        return "this arm failed"
    if not (folder / arm.reference).exists():
        return f"{arm.reference} was not run"
    if arm.reference not in measured:
        return f"{arm.reference} failed"
    start, expected = load(folder / arm.name, Tensors.START), load(folder / arm.reference, Tensors.START)
    if start is None or expected is None or distance(start, expected) != 0.0:
        return "it started from other weights: make_model draws random numbers that torch.manual_seed does not set"
    return ""


def _relative(far: float, size: float) -> Deviation:
    return Deviation(far / size) if size else Deviation(None, "the full batch's is zero")
