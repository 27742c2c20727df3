"""A comparison: every arm in a fresh process of its own, one after the other, then their tensors side by side.

The machine and the versions that a result was measured with; nothing that names a person or a host.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gradfold.compare.arms import ARMS
from gradfold.compare.results import Comparison, Measured, Row, WorkloadFacts, deviations
from gradfold.compare.settings import Settings, Sizes, as_options, check_options, chosen_arms, complete
from gradfold.compare.worker import Task
from gradfold.distributed.launch import RankInfo, find_rank_info
from gradfold.distributed.process_group import ProcessGroup
from gradfold.workloads import registry

__all__ = ["Progress", "accompany", "compare"]


def versions() -> dict[str, str]:
    """The versions of what computes."""
    return {"gradfold": _installed_version(), "torch": torch.__version__, "python": platform.python_version()}


def describe_machine() -> dict[str, Any]:
    """Processor, cores, platform, and the GPU where there is one."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


class OtherPrograms:
    """How much of the machine other programs use while a child runs, where Linux tells."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._busy_since, self._own_since = _busy_s(), _own_s()

    def num_cores(self) -> float | None:
        """How many cores others kept busy, on average, since the making of this; ask when the child has ended."""
        if self._busy_since is None:
            return None
        others = (_busy_s() or 0.0) - self._busy_since - (_own_s() - self._own_since)
        return max(others, 0.0) / (time.monotonic() - self._since)


def _busy_s() -> float | None:
    """Seconds of work of all cores since the machine started: proc(5), the first line of /proc/stat."""
    with suppress(OSError):
        line = Path("/proc/stat").read_text().partition("\n")[0]
        user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(int, line.split()[1:9])
        return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")
    return None


def _own_s() -> float:
    """Seconds of work of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _installed_version() -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version("gradfold")
    return "not installed"


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


_SECONDS_TO_END = 5.0


@dataclass(frozen=True)
class Progress:
    """How far an arm is.

    Args:
        arm: its name.
        samples: samples trained on so far.
        total_samples: of how many.
        updates: updates so far.
        loss: the loss of the last update; None before the first one.
        state: "waiting" (every arm, before the first one starts), "starting", "training", "finished" or "failed".
    """

    arm: str
    samples: int
    total_samples: int
    updates: int
    loss: float | None
    state: str


OnProgress = Callable[[Progress], None]


def compare(
    settings: Settings,
    *,
    on_progress: OnProgress = lambda progress: None,
    command_line: str = "",
    ranks: ProcessGroup | None = None,
) -> Comparison:
    """Train a workload in every arm and compare them.

    An arm that fails becomes a row that says so; the others still run. With `ranks` this is the first of several
    processes, and the others call `accompany` with the same settings.

    Raises:
        OptionError: a setting cannot work.
        WorkloadError: there is no such workload.
        DataError: its data cannot be read.
    """
    check_options(settings)
    workload = registry.load(settings.workload, settings.data)
    arms = chosen_arms(settings, workload)
    sizes = complete(settings, workload)
    facts = WorkloadFacts(workload.name, workload.description, workload.batch_norm, dict(workload.facts))
    del workload  # the arms load their own, and may need the memory
    place = find_rank_info() if ranks is not None else None

    for arm in arms:
        on_progress(Progress(arm, 0, _total_samples(sizes), 0, None, "waiting"))
    measured: dict[str, Measured] = {}
    failures: dict[str, str] = {}
    others: list[float] = []
    with tempfile.TemporaryDirectory(prefix="gradfold-compare-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for arm in arms:
            other_programs = OtherPrograms()
            outcome = _of_all_ranks(_run_arm(_task(arm, settings, sizes, folder, place), sizes, on_progress), ranks)
            others += filter(None, [other_programs.num_cores()])
            if isinstance(outcome, Measured):
                measured[arm] = outcome
            else:
                failures[arm] = outcome
        rows = tuple(
            Row(
                arm=arm,
                description=ARMS[arm].description,
                measured=measured.get(arm),
                deviations=deviations(arm, folder, measured, sizes),
                failure=failures.get(arm),
            )
            for arm in arms
        )
    machine = {**describe_machine(), "cores_busy_with_other_programs": round(max(others, default=0.0), 2)}
    return Comparison(as_options(settings, sizes, arms), sizes, facts, rows, versions(), machine, command_line)


def accompany(settings: Settings, ranks: ProcessGroup) -> None:
    """Run the shares of this rank, which is not the first: what it measures goes nowhere.

    Raises:
        OptionError, WorkloadError, DataError: as `compare`.
    """
    check_options(settings)
    workload = registry.load(settings.workload, settings.data)
    arms, sizes = chosen_arms(settings, workload), complete(settings, workload)
    del workload
    with tempfile.TemporaryDirectory(prefix="gradfold-compare-", ignore_cleanup_errors=True) as name:
        for arm in arms:
            task = _task(arm, settings, sizes, Path(name), find_rank_info())
            _of_all_ranks("" if ARMS[arm].runs_on_one else _run_arm(task, sizes, lambda progress: None), ranks)


def _of_all_ranks(outcome: Measured | str, ranks: ProcessGroup | None) -> Measured | str:
    """The first rank's measurement; where one has failed, what did so first: the others may have waited for it."""
    if ranks is None:
        return outcome
    told = ranks.exchange((time.time(), outcome))
    failures = [(at, rank, one) for rank, (at, one) in enumerate(told) if isinstance(one, str) and one]
    if not failures:
        return outcome
    _, rank, failure = min(failures)
    return failure if rank == 0 else f"on rank {rank}: {failure}"


def _task(arm: str, settings: Settings, sizes: Sizes, folder: Path, place: RankInfo | None) -> Task:
    (folder / arm).mkdir()
    return Task(
        workload=settings.workload,
        data=None if settings.data is None else str(settings.data),
        arm=arm,
        global_batch_size=sizes.global_batch_size,
        micro_batch_size=sizes.micro_batch_size,
        num_epochs=sizes.num_epochs,
        seed=settings.seed,
        num_threads=settings.num_threads,
        folder=str(folder / arm),
        place=None if ARMS[arm].runs_on_one else place,
        chooses_micro_batch=settings.chooses_micro_batch and ARMS[arm].is_gradfold,
    )


def _run_arm(task: Task, sizes: Sizes, on_progress: OnProgress) -> Measured | str:
    """Run one arm to its end: what it measured, or why it failed."""
    total = _total_samples(sizes)
    last = Progress(task.arm, 0, total, 0, None, "starting")
    on_progress(last)
    outcome: Measured | str | None = None
    errors = Path(task.folder) / "stderr.txt"
    with errors.open("wb") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "gradfold.compare.worker", task.to_json()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
        )
    assert child.stdout is not None
    try:
        for line in child.stdout:
            event = json.loads(line)
            if event["event"] == "progress":
                last = Progress(task.arm, event["samples"], total, event["updates"], event["loss"], "training")
                on_progress(last)
            elif event["event"] == "finished":
                outcome = Measured.from_json(event["measured"])
            else:
                outcome = str(event["error"])
        child.wait()
    finally:
        _end(child)
    if outcome is None:
        outcome = _death(child.returncode, errors.read_text(encoding="utf-8", errors="replace"))
    on_progress(_last_progress(outcome, last))
    return _without_home(outcome) if isinstance(outcome, str) else outcome


def _total_samples(sizes: Sizes) -> int:
    return sizes.num_samples * sizes.num_epochs


def _last_progress(outcome: Measured | str, last: Progress) -> Progress:
    if isinstance(outcome, str):
        return Progress(last.arm, last.samples, last.total_samples, last.updates, last.loss, "failed")
    return Progress(
        last.arm, outcome.num_samples, last.total_samples, outcome.num_updates, outcome.final_loss, "finished"
    )


def _end(child: subprocess.Popen[str]) -> None:
    """End a child that still runs, politely first."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _death(return_code: int, stderr: str) -> str:
    """Why a child ended without a word."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last_line = f": {lines[-1]}" if lines else ""
    if return_code >= 0:
        return f"ended with exit code {return_code}{last_line}"
    name = signal.Signals(-return_code).name
    hint = " (on Linux often the kernel, out of memory)" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}{last_line}"


def _without_home(text: str) -> str:
    return text.replace(str(Path.home()), "~")
