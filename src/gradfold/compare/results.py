"""The results of a comparison: what one arm measured, a row per arm, and the whole, as JSON has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from gradfold.compare.arms import ARMS
from gradfold.compare.measure import Memory, Seconds
from gradfold.compare.settings import Settings, Sizes
from gradfold.memory.choice import MicroBatchChoice
from gradfold.memory.measure import PeakMemory

__all__ = ["Comparison", "Deviation", "Measured", "Row"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Curve:
    """Loss against samples seen; each point is a mean over a stretch of samples, placed at its middle."""

    samples: tuple[float, ...]
    loss: tuple[float, ...]

    def thinned(self, num_points: int) -> Curve:
        """The curve in about `num_points` points at most, each a mean over neighbours."""
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
    memory: Memory
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
            memory=Memory(memory["baseline_bytes"], memory["peak_bytes"], memory["measured_by"]),
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
