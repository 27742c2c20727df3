"""The diagnosis: a recorded run becomes a run record, and the record findings and a summary."""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gradfold.doctor.events import Backward, EpochStart, Fetch, Read, Step
from gradfold.doctor.finding import Finding, Report
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.recorder import Recorder
from gradfold.doctor.rules import RULES
from gradfold.doctor.run import Run
from gradfold.doctor.syntax import is_ignored
from gradfold.memory.system import read_memory


def diagnose_run(run: Run) -> Report:
    """Check a run against all rules. Where the doctor failed while it recorded, there is nothing to check."""
    report = run.guard.attempt("the examination", _check, run)
    if report is None:
        report = Report(str(run.script), run.ending, (), {})
    return replace(report, failure=run.guard.failure)


def _check(run: Run) -> Report:
    assert run.recorder is not None  # or the guard knows why
    with run.recorder.paused():
        record = _run_record(run, run.recorder)
    found: dict[tuple[str, int, str], Finding] = {}
    for rule in RULES:
        try:
            observations = list(rule.check(record))
        except Exception as error:
            run.guard.note(f"rule {rule.code}", error)
            continue
        for one in observations:
            file, line = one.location.file or str(run.script), one.location.line
            finding = Finding(rule.code, rule.name, rule.severity, one.confidence, file, line, one.message, one.fix)
            found.setdefault((file, line, rule.code), finding)
    kept = [one for _, one in sorted(found.items()) if not is_ignored(one.file, one.line, one.code)]
    return Report(str(run.script), run.ending, tuple(kept), summarize(record), len(found) - len(kept))


def _run_record(run: Run, recorder: Recorder) -> RunRecord:
    log, has_ended = recorder.log, run.ending.how == "ended"
    if has_ended:
        recorder.detect_changes()
    histories = []
    for one in recorder.provenances:
        pending = log.backwards_at(one.unused if has_ended else ())
        histories.append(OptimizerHistory(one.number, one.name, pending, log))
    has_batch_norms = any(one.graph.batch_norms for one in log.backwards)
    models = _models() if has_batch_norms or recorder.unoptimized.backwards else []
    missing = recorder.unoptimized.unchanged(recorder.optimized_ids())
    parameters = [pair for model in models for pair in model.named_parameters()] if missing else []
    return RunRecord(
        log,
        tuple(histories),
        has_ended,
        read_memory(),
        _batch_norms(models),
        missing,
        tuple(dict.fromkeys(name for name, parameter in parameters if parameter in missing)),
        frozenset(recorder.autocast_dtypes),
        recorder.stopwatch.seconds(),
        recorder.stopwatch.since,
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


def summarize(record: RunRecord) -> dict[str, Any]:
    """What the script does, in plain values: windows, effective batch, memory, time; None for what is unknown."""
    return {
        "num_backwards": len(record.log.backwards),
        "num_updates": sum(len(one.windows) for one in record.optimizers),
        "is_whole_run": record.has_ended,
        "optimizers": [_optimizer(record, one) for one in record.optimizers if one.windows],
        "gradfold": any(one.context.is_gradfold for one in record.log.backwards),
        "autocast": sorted(record.autocast_dtypes),
        "device": record.memory.device,
        "peak_bytes": record.memory.peak_bytes,
        "available_bytes": record.memory.available_bytes or None,
        "seconds": _seconds(record),
    }


def _optimizer(record: RunRecord, history: OptimizerHistory) -> dict[str, Any]:
    lengths = [len(window) for window in history.windows]
    rows = [sum(micro.rows for micro in window.micro_batches) for window in history.windows]
    known = [total for total in rows if total]
    return {
        "optimizer": history.optimizer,
        "num_updates": len(history.windows),
        "window_length": history.window_length,
        "shortest_window": min(lengths, default=0),
        "longest_window": max(lengths, default=0),
        "effective_batch": int(statistics.mode(known)) if known else None,
        "updates_per_epoch": _updates_per_epoch(record, history),
    }


def _updates_per_epoch(record: RunRecord, history: OptimizerHistory) -> int | None:
    """Of the first epoch over the loader that trains, where that epoch was seen to its end."""
    loaders = {micro.loader_state.loader for window in history.windows for micro in window.micro_batches}
    starts = [event for event in record.log.of(EpochStart) if event.loader in loaders]
    ends = [event for event in record.log.of(Fetch) if event.loader in loaders and event.is_end]
    if not starts or not ends:
        return None
    until = next((event.at for event in starts[1:]), len(record.log.events))
    return sum(starts[0].at <= window.step.at < until for window in history.windows)


def _seconds(record: RunRecord) -> dict[str, float]:
    since = record.log.events[record.since :]
    data, backward, reads = (
        sum(one.seconds for one in since if isinstance(one, kind)) for kind in (Fetch, Backward, Read)
    )
    steps = sum(one.seconds for one in record.log.of(Step) if one.at >= record.since and not one.has_closure)
    rest = max(record.seconds - data - backward - steps - reads, 0.0)
    split = {"data": data, "backward": backward, "step": steps, "reads": reads, "forward_and_rest": rest}
    return {name: round(value, 6) for name, value in {"total": record.seconds, **split}.items()}
