"""A comparison: every arm in a fresh process of its own, one after the other, then their tensors side by side.

Beside it, the machine and the versions that a result was measured with; nothing that names a person or a host.
"""

from __future__ import annotations

import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gradfold import __version__
from gradfold.compare.arms import ARMS
from gradfold.compare.data import Sizes
from gradfold.compare.experiment import describe
from gradfold.compare.results import Comparison, Measured, Row, WorkloadFacts, deviations
from gradfold.compare.settings import Settings
from gradfold.distributed.launch import find_rank_info
from gradfold.distributed.process_group import ProcessGroup
from gradfold.errors import GradfoldError
from gradfold.workloads import registry


@dataclass(frozen=True)
class ArmProgress:
    """How far an arm is, in samples and updates."""

    arm: str
    total_samples: int
    state: str = "waiting"  # every arm, before the first one starts; "starting", "training", "finished" or "failed"
    samples: int = 0
    updates: int = 0
    loss: float | None = None  # of the last update


OnProgress = Callable[[ArmProgress], None]


def compare(
    settings: Settings,
    *,
    on_progress: OnProgress = lambda progress: None,
    command_line: str = "",
    group: ProcessGroup | None = None,
) -> Comparison:
    """Train a workload in every arm and compare them.

    An arm that fails becomes a row that says so; the others still run. With a process group this is its first rank,
    and the others call `accompany` with the same settings.

    Raises:
        OptionError: a setting cannot work.
        WorkloadError: there is no such workload.
        DataError: its data cannot be read.
    """
    settings, sizes, facts = _prepare(settings)
    arms = settings.arms or ()
    for arm in arms:
        on_progress(ArmProgress(arm, sizes.total_samples))
    outcomes: dict[str, Measured | str] = {}
    busy_cores = 0.0
    with _temporary_folder() as name:
        folder = Path(name)
        for arm in arms:
            num_busy_cores = watch_other_programs()
            outcomes[arm] = _of_all_ranks(*_run_arm(arm, settings, sizes, folder, on_progress), group)
            busy_cores = max(busy_cores, num_busy_cores())
        measured = {arm: outcome for arm, outcome in outcomes.items() if isinstance(outcome, Measured)}
        failures = {arm: outcome for arm, outcome in outcomes.items() if isinstance(outcome, str)}
        rows = tuple(
            Row(arm, measured.get(arm), deviations(arm, folder, measured, sizes), failures.get(arm)) for arm in arms
        )
    machine = {**describe_machine(), "cores_busy_with_other_programs": round(busy_cores, 2)}
    versions = {"gradfold": __version__, "torch": torch.__version__, "python": platform.python_version()}
    return Comparison(settings, sizes, facts, rows, versions, machine, command_line)


def accompany(settings: Settings, group: ProcessGroup) -> None:
    """Run the parts of this rank, which is not the first; what it measures is not reported."""
    settings, sizes, _ = _prepare(settings)
    with _temporary_folder() as name:
        for arm in settings.arms or ():
            runs = not ARMS[arm].runs_on_one
            outcome = _run_arm(arm, settings, sizes, Path(name), lambda _: None) if runs else ("", 0.0)
            _of_all_ranks(*outcome, group)


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix="gradfold-compare-", ignore_cleanup_errors=True)
    except OSError as error:  # so also where every disk is full
        raise GradfoldError(
            f"no folder for the arms' tensors: {error.strerror}. Set TMPDIR to one with room."
        ) from error


def _prepare(settings: Settings) -> tuple[Settings, Sizes, WorkloadFacts]:
    """The settings with the arms filled in, the sizes, and facts of the workload, which every arm loads itself."""
    settings.check()
    workload = registry.load(settings.workload, settings.data)
    facts = WorkloadFacts(workload.name, workload.description, workload.batch_norm, dict(workload.facts))
    return replace(settings, arms=settings.arms_for(workload)), settings.sizes_for(workload), facts


def _of_all_ranks(outcome: Measured | str, ended_s: float, group: ProcessGroup | None) -> Measured | str:
    """The first rank's measurement, or the earliest failure of any: the other ranks may have waited for that one."""
    if group is None:
        return outcome
    outcomes = group.exchange((ended_s, outcome))
    failures = [(at, rank, one) for rank, (at, one) in enumerate(outcomes) if isinstance(one, str) and one]
    if not failures:
        return outcome
    _, rank, failure = min(failures)
    return failure if rank == 0 else f"on rank {rank}: {failure}"


def _run_arm(
    arm: str, settings: Settings, sizes: Sizes, folder: Path, on_progress: OnProgress
) -> tuple[Measured | str, float]:
    """Run one arm in a child process: what it measured, or why it failed; and when it said so."""
    try:
        return _run_child(arm, settings, sizes, folder, on_progress)
    except OSError as error:  # no room for its files, or for a process: the arms before it are not lost
        on_progress(ArmProgress(arm, sizes.total_samples, "failed"))
        return f"cannot be started: {describe(error)}", time.time()


def _run_child(
    arm: str, settings: Settings, sizes: Sizes, folder: Path, on_progress: OnProgress
) -> tuple[Measured | str, float]:
    progress = ArmProgress(arm, sizes.total_samples, "starting")
    on_progress(progress)
    (folder / arm).mkdir()
    rank_info = None if ARMS[arm].runs_on_one else find_rank_info()
    task, errors = folder / arm / "task.pickle", folder / arm / "stderr.txt"
    task.write_bytes(pickle.dumps((ARMS[arm], settings, folder / arm, rank_info)))
    command = [sys.executable, "-m", "gradfold.compare.worker", str(task)]
    outcome: Measured | str | None = None
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr) as child,
    ):
        assert child.stdout is not None
        try:
            while True:
                report = pickle.load(child.stdout)
                if isinstance(report, dict):
                    progress = replace(progress, state="training", **report)
                    on_progress(progress)
                else:
                    outcome, ended_s = (
                        report,
                        time.time(),
                    )  # its end breaks connections of other ranks
        except (EOFError, pickle.UnpicklingError):  # the child has ended, perhaps within a report
            child.stdout.close()  # or it has not, and must not wait for a reader
            child.wait()
        finally:
            child.kill()
            child.wait()
    if outcome is None:
        ended_s = time.time()
        outcome = _describe_exit(child.returncode, errors.read_text(encoding="utf-8", errors="replace"))
    if isinstance(outcome, str):
        on_progress(replace(progress, state="failed"))
        return outcome.replace(str(Path.home()), "~"), ended_s
    samples, updates, loss = outcome.num_samples, outcome.num_updates, outcome.final_loss
    on_progress(replace(progress, samples=samples, updates=updates, loss=loss, state="finished"))
    return outcome, ended_s


def _describe_exit(return_code: int, stderr: str) -> str:
    """Why a child ended without a report."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last_line = f": {lines[-1]}" if lines else ""
    if return_code >= 0:
        return f"ended with exit code {return_code}{last_line}"
    name = signal.Signals(-return_code).name
    hint = " (on Linux often the kernel, out of memory)" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}{last_line}"


def watch_other_programs() -> Callable[[], float]:
    """Watch how many cores other programs keep busy, on average from now to the call; 0 where Linux does not tell."""
    start, before = time.monotonic(), _other_programs_s()
    return lambda: max(_other_programs_s() - before, 0.0) / (time.monotonic() - start)


def _other_programs_s() -> float:
    """Seconds of work of all cores, but for this process and its children that have ended.

    Source: proc(5), the first line of /proc/stat.
    """
    with suppress(OSError):
        line = Path("/proc/stat").read_text().partition("\n")[0]
        user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(int, line.split()[1:9])
        busy_s = (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")
        return busy_s - sum(os.times()[:4])  # user and system, own and of children
    return 0.0


def describe_machine() -> dict[str, Any]:
    """Processor, cores, platform, and the GPU where there is one."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    system = f"{platform.system()} {platform.machine()}"
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "platform": system, **gpu}


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
