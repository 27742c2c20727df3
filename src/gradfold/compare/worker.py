"""The process of one arm: trains, measures, and reports to its parent by pickles on standard output.

`python -m gradfold.compare.worker FILE`, where the file has the pickled arguments of `run`. What a workload prints goes
to standard error.
"""

from __future__ import annotations

import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch

from gradfold.compare.arms import Arm
from gradfold.compare.experiment import Experiment, describe
from gradfold.compare.loops import Update, num_samples
from gradfold.compare.output import lasting_streams
from gradfold.compare.results import Measured
from gradfold.compare.settings import Settings
from gradfold.distributed.launch import RankInfo, child_process_group
from gradfold.workloads import registry

_SECONDS_BETWEEN_REPORTS = 0.1

Report: TypeAlias = "dict[str, float] | Measured | str"
"""Fields of an `ArmProgress`; at the end what was measured, or why the arm failed."""


def main() -> None:
    """Run the arm that the file in the first argument says; exit with 1 where it fails."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    report = _open_report()
    with lasting_streams():  # what a workload prints must not fail its arm
        try:
            arm, settings, folder, rank_info = pickle.loads(Path(sys.argv[1]).read_bytes())
            report(run(arm, settings, folder, rank_info, report))
        except (Exception, SystemExit) as error:
            report(describe(error))
            sys.exit(1)


def run(
    arm: Arm, settings: Settings, folder: Path, rank_info: RankInfo | None, report: Callable[[Report], None]
) -> Measured:
    """Train and measure an arm, and report progress meanwhile.

    It leaves gradients and weights in the folder. `rank_info` is of several processes that share each global batch.
    """
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
            report({"updates": num_updates, "samples": num_samples(updates), "loss": updates[-1].loss})

    with nullcontext() if rank_info is None else child_process_group(rank_info, arm.name) as group:
        experiment = Experiment(workload, arm, sizes, settings.seed, folder, group)
        if not settings.tunes_micro_batch or arm.loop != "gradfold" or arm.requires == "token_budget":
            return experiment.run(on_update)
        choice = experiment.tune()
        sizes = replace(sizes, micro_batch_size=choice.micro_batch_size)
        return replace(replace(experiment, sizes=sizes).run(on_update), choice=choice)


def _open_report() -> Callable[[Report], None]:
    """Keep standard output for reports, and send everything else that is printed to standard error."""
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def report(value: Report) -> None:
        pickle.dump(value, reports)
        reports.flush()

    return report


if __name__ == "__main__":
    main()
