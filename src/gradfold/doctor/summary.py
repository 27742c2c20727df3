"""A summary: what a script does, in numbers: windows, effective batch, updates per epoch, memory, time."""

from __future__ import annotations

import statistics
from typing import Any

from gradfold.doctor.case import Case
from gradfold.doctor.events import Backward, Fetch, Pass, Read, Step
from gradfold.doctor.training import Training

__all__: list[str] = []


def summarise(case: Case) -> dict[str, Any]:
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


def _optimizer(case: Case, one: Training) -> dict[str, Any]:
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


def _updates_per_epoch(case: Case, one: Training) -> int | None:
    """Of the first pass over the loader that trains, where that pass was seen to its end."""
    loaders = {micro.loader for window in one.windows for micro in window.micro_batches}
    starts = [event for event in case.events(Pass) if event.loader in loaders]
    ends = [event for event in case.events(Fetch) if event.loader in loaders and event.number < 0]
    if not starts or not ends:
        return None
    until = next((event.at for event in starts[1:]), case.tape.next)
    return sum(starts[0].at <= window.step.at < until for window in one.windows)


def _total(case: Case, kind: type[Fetch] | type[Backward] | type[Read]) -> float:
    return sum(one.seconds for one in case.tape.events[case.since :] if isinstance(one, kind))


def _seconds(case: Case) -> dict[str, float]:
    data, backward, reads = (_total(case, kind) for kind in (Fetch, Backward, Read))
    steps = sum(one.seconds for one in case.events(Step) if one.at >= case.since and not one.has_closure)
    rest = max(case.seconds - data - backward - steps - reads, 0.0)
    split = {"data": data, "backward": backward, "step": steps, "reads": reads, "forward_and_rest": rest}
    return {name: round(value, 6) for name, value in {"total": case.seconds, **split}.items()}
