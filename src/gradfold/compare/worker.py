"""The process of one arm: trains, measures, and reports to its parent on standard output, one JSON object per line.

`python -m gradfold.compare.worker TASK` with the task as JSON. What a workload prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gradfold.compare.arms import ARMS
from gradfold.compare.experiment import Experiment, describe, num_samples
from gradfold.compare.loops import Update
from gradfold.compare.results import Measured
from gradfold.compare.serialization import from_plain, to_plain
from gradfold.compare.settings import Settings
from gradfold.distributed.launch import RankInfo, child_process_group
from gradfold.workloads import registry

_SECONDS_BETWEEN_REPORTS = 0.1

Report = Callable[[str, Any], None]
"""Called with what is reported ("progress", "measured" or "error") and the value."""


@dataclass(frozen=True)
class Task:
    """What one child trains."""

    arm: str
    settings: Settings
    folder: Path  # where gradients and weights are left for the parent
    rank_info: RankInfo | None = None  # of several processes that share each global batch; None: this one has all of it


def main() -> None:
    """Run the task in the first argument; exit with 1 where it fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    report = _open_report()
    try:
        measured = run(from_plain(Task, json.loads(sys.argv[1])), report)
    except Exception as error:
        report("error", describe(error))
        sys.exit(1)
    report("measured", to_plain(measured))


def run(task: Task, report: Report) -> Measured:
    """Train and measure the arm of a task, and report progress meanwhile."""
    settings, arm = task.settings, ARMS[task.arm]
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    random.seed(settings.seed)
    torch.manual_seed(settings.seed)
    workload = registry.load(settings.workload, settings.data)
    sizes = settings.sizes_for(workload)
    last = 0.0

    def on_update(updates: Sequence[Update]) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_REPORTS:
            last = time.monotonic()
            num_updates = sum(update.applied for update in updates)
            report("progress", {"updates": num_updates, "samples": num_samples(updates), "loss": updates[-1].loss})

    with nullcontext() if task.rank_info is None else child_process_group(task.rank_info, task.arm) as group:
        experiment = Experiment(workload, arm, sizes, settings.seed, task.folder, group)
        if not settings.tunes_micro_batch or arm.loop != "gradfold" or arm.requires == "token_budget":
            return experiment.run(on_update)
        choice = experiment.tune()
        sizes = replace(sizes, micro_batch_size=choice.micro_batch_size)
        return replace(replace(experiment, sizes=sizes).run(on_update), choice=choice)


def _open_report() -> Report:
    """Keep standard output for reports, and send everything else that is printed to standard error."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def report(what: str, value: Any) -> None:
        lines.write(json.dumps({what: value}) + "\n")
        lines.flush()

    return report


if __name__ == "__main__":
    main()
