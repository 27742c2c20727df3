"""An examination: a watched run becomes a case, and the case findings and a summary.

A summary: what a script does, in numbers: windows, effective batch, updates per epoch, memory, time.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradfold.doctor.events import Backward, EpochStart, Fetch, Read, Step
from gradfold.doctor.finding import Finding
from gradfold.doctor.history import OptimizerHistory, RunRecord, UnoptimizedParameter, trainings
from gradfold.doctor.instrumentation import Failure
from gradfold.doctor.recorder import Recorder
from gradfold.doctor.rules import RULES
from gradfold.doctor.run import Ending, Run
from gradfold.doctor.source import is_ignored
from gradfold.memory.system import read_memory

__all__: list[str] = []


def summarize(case: RunRecord) -> dict[str, Any]:
    """In plain values; None stands for what is not known."""
    return {
        "num_backwards": len(case.tape.backwards),
        "num_updates": sum(len(one.windows) for one in case.trainings),
        "is_whole_run": case.ended,
        "optimizers": [_optimizer(case, one) for one in case.trainings if one.windows],
        "gradfold": any(one.is_gradfold for one in case.tape.backwards),
        "autocast": sorted(case.precisions),
        "device": case.memory.device,
        "peak_bytes": case.memory.peak_bytes,
        "available_bytes": case.memory.available_bytes or None,
        "seconds": _seconds(case),
    }


def _optimizer(case: RunRecord, one: OptimizerHistory) -> dict[str, Any]:
    sizes = [len(window) for window in one.windows]
    rows = [sum(micro.rows for micro in window.micro_batches) for window in one.windows]
    known = [total for total in rows if total]
    return {
        "optimizer": one.optimizer,
        "num_updates": len(one.windows),
        "window_length": one.usual,
        "shortest_window": min(sizes, default=0),
        "longest_window": max(sizes, default=0),
        "effective_batch": int(statistics.mode(known)) if known else None,
        "updates_per_epoch": _updates_per_epoch(case, one),
    }


def _updates_per_epoch(case: RunRecord, one: OptimizerHistory) -> int | None:
    """Of the first pass over the loader that trains, where that pass was seen to its end."""
    loaders = {micro.loader for window in one.windows for micro in window.micro_batches}
    starts = [event for event in case.events(EpochStart) if event.loader in loaders]
    ends = [event for event in case.events(Fetch) if event.loader in loaders and event.number < 0]
    if not starts or not ends:
        return None
    until = next((event.at for event in starts[1:]), case.tape.next)
    return sum(starts[0].at <= window.step.at < until for window in one.windows)


def _total(case: RunRecord, kind: type[Fetch] | type[Backward] | type[Read]) -> float:
    return sum(one.seconds for one in case.tape.events[case.since :] if isinstance(one, kind))


def _seconds(case: RunRecord) -> dict[str, float]:
    data, backward, reads = (_total(case, kind) for kind in (Fetch, Backward, Read))
    steps = sum(one.seconds for one in case.events(Step) if one.at >= case.since and not one.has_closure)
    rest = max(case.seconds - data - backward - steps - reads, 0.0)
    split = {"data": data, "backward": backward, "step": steps, "reads": reads, "forward_and_rest": rest}
    return {name: round(value, 6) for name, value in {"total": case.seconds, **split}.items()}


@dataclass(frozen=True)
class Report:
    """What the doctor says of one script.

    Attributes:
        script: its path.
        ending: how the run ended.
        findings: by file, line and code.
        summary: what the script does, in plain values.
        num_ignored: findings that a comment silences.
        failure: where the doctor itself failed; nothing was examined after that, but what other rules found.
    """

    script: str
    ending: Ending
    findings: tuple[Finding, ...]
    summary: dict[str, Any]
    num_ignored: int = 0
    failure: Failure | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "script": self.script,
            "ending": {"how": self.ending.how, "code": self.ending.code, "error": self.ending.error},
            "findings": [one.to_dict() for one in self.findings],
            "num_ignored": self.num_ignored,
            "summary": self.summary,
            "failure": None if self.failure is None else self.failure.to_dict(),
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Report:
        """The report of plain values."""
        findings = tuple(Finding(**one) for one in values["findings"])
        ending = Ending(**values["ending"])
        failure = None if values["failure"] is None else Failure(**values["failure"])
        return Report(values["script"], ending, findings, values["summary"], values["num_ignored"], failure)


def examine(run: Run) -> Report:
    """Judge a run. Where the doctor failed while it looked there is nothing to judge."""
    report = run.guard.attempt("the examination", _examine, run)
    if report is None:
        report = Report(str(run.script), run.ending, (), {})
    return replace(report, failure=run.guard.failure)


def _examine(run: Run) -> Report:
    script, watch, ending = run.script, run.watch, run.ending
    assert watch is not None  # or the guard knows why
    with watch.quietly():
        case = _case(script, watch, ending)
    found: dict[tuple[str, int, str], Finding] = {}
    for rule in RULES:
        try:
            observations = list(rule.check(case))
        except Exception as error:
            run.guard.note(f"rule {rule.code}", error)
            continue
        for seen in observations:
            key = (seen.place.file, seen.place.line, rule.code)
            finding = Finding(
                rule.code,
                rule.name,
                rule.severity,
                seen.confidence,
                seen.place.file or str(script),
                seen.place.line,
                seen.message,
                seen.fix,
            )
            found.setdefault(key, finding)
    kept = [one for key, one in sorted(found.items()) if not is_ignored(one.file, one.line, one.code)]
    return Report(str(script), ending, tuple(kept), summarize(case), len(found) - len(kept))


def _case(script: Path, watch: Recorder, ending: Ending) -> RunRecord:
    ended = ending.how == "ended"
    if ended:
        watch.settle()
    names = [type(optimizer).__name__ if (optimizer := one.optimizer()) else "" for one in watch.ledgers]
    steps = {one.ledger: one.optimizer for one in watch.tape.events if isinstance(one, Step)}
    names = [name or steps.get(number, "Optimizer") for number, name in enumerate(names)]
    has_batch_norms = any(one.census is not None and one.census.batch_norms for one in watch.tape.backwards)
    models = _models() if has_batch_norms or watch.strays.parameters else []
    return RunRecord(
        script,
        watch.tape,
        tuple(trainings(watch.tape, watch.standing() if ended else {}, names)),
        ended,
        read_memory(),
        _batch_norms(models),
        _stray(watch, models),
        frozenset(watch.precisions),
        watch.stopwatch.read(),
        watch.stopwatch.since,
    )


def _models() -> list[nn.Module]:
    """The outermost modules that are alive."""
    everything = [one for one in gc.get_objects() if issubclass(type(one), nn.Module)]
    inner = {id(child) for one in everything for child in one.children()}
    return [one for one in everything if id(one) not in inner]


def _batch_norms(models: list[nn.Module]) -> dict[int, str]:
    names: dict[int, str] = {}
    for model in models:
        for name, module in model.named_modules():
            mean = getattr(module, "running_mean", None)
            if isinstance(mean, Tensor):
                names.setdefault(mean.data_ptr(), name or type(module).__name__)
    return names


def _stray(watch: Recorder, models: list[nn.Module]) -> UnoptimizedParameter | None:
    lost = watch.strays.unmoved(watch.known())
    if not lost:
        return None
    names = [name for model in models for name, parameter in model.named_parameters() if id(parameter) in lost]
    passes = [watch.strays.backwards[key] for key in lost]
    first, number = min(some[0] for some in passes), max(len(some) for some in passes)
    return UnoptimizedParameter(tuple(dict.fromkeys(names)), sum(one.numel() for one in lost.values()), number, first)
