"""The results of a comparison: what one arm measured, a row per arm, and the whole, as JSON has it.

The tensors that an arm leaves for its parent, in files: gradients and weights by the name of their parameter.

How far an arm is from its reference: distances between the tensors that both have left, computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradfold.compare.arms import ARMS
from gradfold.compare.measure import MeasuredMemory, Seconds
from gradfold.compare.settings import Settings, Sizes
from gradfold.memory.auto import MicroBatchChoice
from gradfold.memory.measure import PeakMemory

__all__ = ["Comparison", "Deviation", "Measured", "Row"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Curve:
    """Loss against samples seen; each point is a mean over a stretch of samples, placed at its middle."""

    samples: tuple[float, ...]
    loss: tuple[float, ...]

    def thinned(self, num_points: int) -> Curve:
        """The curve in about `num_points` points at most, each a mean over neighbors."""
        size = -(-len(self.loss) // num_points)
        cuts = [slice(start, start + size) for start in range(0, len(self.loss), size)]
        return Curve(*(tuple(fmean(values[cut]) for cut in cuts) for values in (self.samples, self.loss)))

    def to_json(self) -> dict[str, Any]:
        """As lists; a loss that is not finite is null."""
        return {"samples": list(self.samples), "loss": [_finite(loss) for loss in self.loss]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curve:
        """The curve from `to_json`."""
        return cls(tuple(data["samples"]), tuple(_number(loss) for loss in data["loss"]))


@dataclass(frozen=True)
class Measured:
    """What the process of one arm measured.

    Args:
        num_updates: updates of the weights.
        num_skipped: updates that a loss scaler left out, since the scaled gradient had overflowed.
        num_samples: samples trained on, over all epochs.
        num_threads: threads of torch.
        device: "cpu" or "cuda".
        seconds: training time by phase, without evaluation.
        memory: peak memory of training.
        final_loss: training loss, the weighted mean over the last epoch.
        metrics: what the workload's `evaluate` gives after training.
        curve: loss against samples seen.
        notes: why something could not be measured, by its name.
        tracked: peak memory of tensors, with its make-up, in updates of its own.
        choice: the micro-batch that the arm chose itself, where it was to.
    """

    num_updates: int
    num_samples: int
    num_threads: int
    device: str
    seconds: Seconds
    memory: MeasuredMemory
    final_loss: float
    metrics: Mapping[str, float]
    curve: Curve
    notes: Mapping[str, str] = field(default_factory=dict)
    num_skipped: int = 0
    tracked: PeakMemory | None = None
    choice: MicroBatchChoice | None = None

    @property
    def samples_per_s(self) -> float:
        """Samples trained on per second."""
        return self.num_samples / self.seconds.total if self.seconds.total else math.nan

    def to_json(self) -> dict[str, Any]:
        """As plain values; numbers that are not finite are null."""
        return {
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
            "num_samples": self.num_samples,
            "num_threads": self.num_threads,
            "device": self.device,
            "samples_per_s": _finite(self.samples_per_s),
            "seconds": self.seconds.to_json(),
            "memory": self.memory.to_json(),
            "tracked_memory": None if self.tracked is None else self.tracked.to_json(),
            "micro_batch_choice": None if self.choice is None else self.choice.to_json(),
            "final_loss": _finite(self.final_loss),
            "metrics": {name: _finite(value) for name, value in self.metrics.items()},
            "notes": dict(self.notes),
            "curve": self.curve.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        """The measurements from `to_json`."""
        seconds, memory = data["seconds"], data["memory"]
        tracked, choice = data["tracked_memory"], data["micro_batch_choice"]
        return cls(
            num_updates=data["num_updates"],
            num_samples=data["num_samples"],
            num_threads=data["num_threads"],
            device=data["device"],
            seconds=Seconds(seconds["forward"], seconds["backward"], seconds["update"], seconds["other"]),
            memory=MeasuredMemory(memory["baseline_bytes"], memory["peak_bytes"], memory["measured_by"]),
            final_loss=_number(data["final_loss"]),
            metrics={name: _number(value) for name, value in data["metrics"].items()},
            curve=Curve.from_json(data["curve"]),
            notes=data["notes"],
            num_skipped=data["num_skipped"],
            tracked=None if tracked is None else PeakMemory.from_json(tracked),
            choice=None if choice is None else MicroBatchChoice.from_json(choice),
        )


@dataclass(frozen=True)
class Deviation:
    """How far something of an arm is from its reference's, relative to its size; or why there is no such number."""

    value: float | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"value": None if self.value is None else _finite(self.value), "note": self.note}


@dataclass(frozen=True)
class Deviations:
    """How far an arm is from its reference, the full batch of the same model.

    Args:
        gradient_float32: the gradient of the first update, as it was run.
        gradient_float64: the same, computed in float64.
        last_window_float64: the gradient of an epoch's last, partial window, at the first weights, in float64.
        weights: the weights after training, relative to the way that the full batch's went.
    """

    gradient_float32: Deviation
    gradient_float64: Deviation
    last_window_float64: Deviation
    weights: Deviation

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "gradient_float32": self.gradient_float32.to_json(),
            "gradient_float64": self.gradient_float64.to_json(),
            "last_window_float64": self.last_window_float64.to_json(),
            "weights": self.weights.to_json(),
        }


@dataclass(frozen=True)
class Row:
    """One arm: what it measured and how far it is from its reference, or why it failed."""

    arm: str
    description: str
    measured: Measured | None
    deviations: Deviations
    failure: str | None = None

    @property
    def reference(self) -> str:
        """The arm from which the deviations of this one are measured."""
        return ARMS[self.arm].reference

    @property
    def is_reference(self) -> bool:
        """Whether other arms are measured from this one."""
        return self.arm == self.reference

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "arm": self.arm,
            "description": self.description,
            "status": "failed" if self.measured is None else "finished",
            "failure": self.failure,
            "reference": self.reference,
            "deviation_from_full_batch": self.deviations.to_json(),
            "measured": None if self.measured is None else self.measured.to_json(),
        }


@dataclass(frozen=True)
class WorkloadFacts:
    """What a reader should know about the workload."""

    name: str
    description: str
    batch_norm: str | None
    facts: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "facts": dict(self.facts)}


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

    @property
    def first_gradients_in(self) -> str:
        """What the gradients of first updates were computed in: not always float32 where precisions are compared."""
        return "as run" if any(ARMS[row.arm].precision for row in self.rows) else "float32"

    @property
    def has_failures(self) -> bool:
        """Whether an arm failed."""
        return any(row.measured is None for row in self.rows)

    def row(self, arm: str) -> Row | None:
        """The row of an arm, if it was run."""
        return next((row for row in self.rows if row.arm == arm), None)

    def measured(self, arm: str) -> Measured | None:
        """What an arm measured, if it was run to its end."""
        row = self.row(arm)
        return None if row is None else row.measured

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "command_line": self.command_line,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "settings": self.settings.to_json(),
            "workload": self.workload.to_json(),
            "sizes": {**asdict(self.sizes), "last_window": self.sizes.last_window},
            "rows": [row.to_json() for row in self.rows],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class Tensors:
    """The names of what an arm saves."""

    START: Final = "start"
    FINAL: Final = "final"
    GRADIENT_FLOAT32: Final = "gradient_float32"
    GRADIENT_FLOAT64: Final = "gradient_float64"
    LAST_WINDOW_FLOAT64: Final = "last_window_float64"


def save_parameters(model: nn.Module, folder: Path, name: str) -> None:
    """Save the weights."""
    _save({key: parameter.detach() for key, parameter in model.named_parameters()}, folder, name)


def save_gradients(model: nn.Module, folder: Path, name: str) -> None:
    """Save `.grad` of every parameter that has one; a missing one counts as zero."""
    gradients = {key: p.grad.detach() for key, p in model.named_parameters() if p.grad is not None}
    _save({key: grad.to_dense() if grad.is_sparse else grad for key, grad in gradients.items()}, folder, name)


def load(folder: Path, name: str) -> dict[str, Tensor] | None:
    """The tensors in float64, or None where the arm did not come so far."""
    path = folder / f"{name}.pt"
    if not path.exists():
        return None
    saved: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return {key: tensor.double() for key, tensor in saved.items()}


def norm(tensors: dict[str, Tensor]) -> float:
    """The Euclidean norm over all tensors."""
    return float(torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().sqrt()) if tensors else 0.0


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, Tensor]:
    """`left - right` per name, where a missing tensor is zero."""
    zero = torch.zeros(())
    return {key: left.get(key, zero) - right.get(key, zero) for key in {**left, **right}}


def _save(tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    torch.save(tensors, folder / f"{name}.pt")


def deviations(arm: str, folder: Path, measured: dict[str, Measured], sizes: Sizes) -> Deviations:
    """The deviations of an arm.

    Args:
        arm: its name.
        folder: holds a folder per arm.
        measured: the arms that ran to their end.
        sizes: what was trained.
    """
    if reason := _incomparable(arm, folder, measured):
        return _none(reason)
    last_window = _of_tensors(arm, folder, measured, Tensors.LAST_WINDOW_FLOAT64)
    if not ARMS[arm].accumulates:
        last_window = Deviation(None, "it has no windows")
    elif not sizes.last_window:
        last_window = Deviation(None, "all windows are full")
    return Deviations(
        gradient_float32=_of_tensors(arm, folder, measured, Tensors.GRADIENT_FLOAT32),
        gradient_float64=_of_tensors(arm, folder, measured, Tensors.GRADIENT_FLOAT64),
        last_window_float64=last_window,
        weights=_of_weights(arm, folder),
    )


def _none(note: str) -> Deviations:
    nothing = Deviation(None, note)
    return Deviations(nothing, nothing, nothing, nothing)


def _incomparable(arm: str, folder: Path, measured: dict[str, Measured]) -> str:
    """Why nothing of an arm can be compared with its reference, or an empty text."""
    if arm not in measured:
        return "this arm failed"
    reference = ARMS[arm].reference
    if not (folder / reference).exists():
        return f"{reference} was not run"
    if reference not in measured:
        return f"{reference} failed"
    start, expected = load(folder / arm, Tensors.START), load(folder / reference, Tensors.START)
    if start is None or expected is None or norm(difference(start, expected)) != 0.0:
        return "it started from other weights: make_model draws random numbers that torch.manual_seed does not set"
    return ""


def _of_tensors(arm: str, folder: Path, measured: dict[str, Measured], name: str) -> Deviation:
    reference_arm = ARMS[arm].reference
    own, reference = load(folder / arm, name), load(folder / reference_arm, name)
    if own is None or reference is None:
        return Deviation(None, measured[arm].notes.get(name) or measured[reference_arm].notes.get(name, "not measured"))
    return _relative(difference(own, reference), norm(reference))


def _of_weights(arm: str, folder: Path) -> Deviation:
    reference_folder = folder / ARMS[arm].reference
    final, reference = load(folder / arm, Tensors.FINAL), load(reference_folder, Tensors.FINAL)
    start = load(reference_folder, Tensors.START)
    assert final is not None and reference is not None and start is not None  # both arms ran to their end
    return _relative(difference(final, reference), norm(difference(reference, start)))


def _relative(distance: dict[str, Tensor], size: float) -> Deviation:
    if size == 0.0:
        return Deviation(None, "the full batch's is zero")
    return Deviation(norm(distance) / size)
