"""The process of one arm: trains, measures, and tells its parent on standard output, one JSON object per line.

`python -m gradfold.compare.worker TASK` with the task as JSON. What a workload prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gradfold.compare.arms import ARMS
from gradfold.compare.experiment import measure_arm
from gradfold.compare.results import Measured
from gradfold.distributed.launch import RankInfo, meeting_of_children
from gradfold.workloads import registry

__all__: list[str] = []

_SECONDS_BETWEEN_EVENTS = 0.1


@dataclass(frozen=True)
class Task:
    """What one child trains, all defaults filled in.

    Args:
        workload: the workload as on the command line.
        data: its folder of data files.
        arm: name of the arm.
        global_batch_size: samples of one update.
        micro_batch_size: samples that are run at once.
        num_epochs: passes over the training samples.
        seed: draws the first weights and the order of samples.
        num_threads: threads of torch.
        folder: where the gradients and weights are left for the parent.
        place: which of several processes that share each global batch; None: this one has all of it.
        chooses_micro_batch: whether an arm of the library chooses its micro-batch itself.
    """

    workload: str
    data: str | None
    arm: str
    global_batch_size: int
    micro_batch_size: int
    num_epochs: int
    seed: int
    num_threads: int | None
    folder: str
    place: RankInfo | None = None
    chooses_micro_batch: bool = False

    def to_json(self) -> str:
        """The task as one argument of a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        """The task from `to_json`."""
        fields = json.loads(text)
        place = fields.pop("place")
        return cls(**fields, place=None if place is None else RankInfo(**place))


def main() -> None:
    """Run the task in the first argument; exit with 1 where it failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    tell = _protocol()
    try:
        measured = run(Task.from_json(sys.argv[1]), tell)
    except Exception as error:
        tell({"event": "failed", "error": describe(error)})
        sys.exit(1)
    tell({"event": "finished", "measured": measured.to_json()})


def run(task: Task, tell: Callable[[Mapping[str, Any]], None]) -> Measured:
    """Do what the task says, and report progress on the way."""
    if task.num_threads is not None:
        torch.set_num_threads(task.num_threads)
    random.seed(task.seed)
    torch.manual_seed(task.seed)
    workload = registry.load(task.workload, None if task.data is None else Path(task.data))
    last = 0.0

    def on_update(updates: int, samples: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_EVENTS:
            last = time.monotonic()
            tell({"event": "progress", "updates": updates, "samples": samples, "loss": loss})

    with nullcontext() if task.place is None else meeting_of_children(task.place, task.arm) as ranks:
        return measure_arm(
            workload,
            ARMS[task.arm],
            global_batch_size=task.global_batch_size,
            micro_batch_size=task.micro_batch_size,
            num_epochs=task.num_epochs,
            seed=task.seed,
            folder=Path(task.folder),
            on_update=on_update,
            ranks=ranks,
            chooses_micro_batch=task.chooses_micro_batch,
        )


def describe(error: BaseException) -> str:
    """An error in one line, with memory named first where that was the reason."""
    lines = str(error).strip().splitlines() or [""]
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    return f"{'out of memory: ' if out_of_memory else ''}{type(error).__name__}: {lines[0]}".rstrip(": ")


def _protocol() -> Callable[[Mapping[str, Any]], None]:
    """Keep standard output for events, and send everything else that is printed to standard error."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(event: Mapping[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    return tell


if __name__ == "__main__":
    main()
