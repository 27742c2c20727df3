"""A paired measurement: several ways of doing the same, timed in turn in every round, compared round by round.

Machines are shared and their speed drifts. Within a round the drift is the same for all, so the ratio of two times of
one round says more than the ratio of two averages. The order within a round is random: what runs first may find
colder caches.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

import gradfold

Arms = Mapping[str, Callable[[], object]]


def time_rounds(arms: Arms, num_rounds: int, num_warmup: int) -> dict[str, list[float]]:
    """Seconds per arm, one entry per round."""
    order = list(arms)
    elapsed_s: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(num_warmup + num_rounds):
        random.shuffle(order)
        for name in order:
            start = time.perf_counter()
            arms[name]()
            end = time.perf_counter()
            if round_number >= num_warmup:
                elapsed_s[name].append(end - start)
        if sys.stderr.isatty():
            print(f"\rround {round_number + 1} of {num_warmup + num_rounds}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return elapsed_s


def ratio(elapsed_s: Mapping[str, list[float]], arm: str, to: str) -> dict[str, float]:
    """The paired ratio of two arms: median over the rounds, and its quartiles."""
    ratios = [one / other for one, other in zip(elapsed_s[arm], elapsed_s[to], strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return {"median": round(median, 4), "lower_quartile": round(lower, 4), "upper_quartile": round(upper, 4)}


def write(path: Path, question: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """A result with what is needed to judge it."""
    record = {
        "question": question,
        "date": date.today().isoformat(),
        "versions": {
            "gradfold": gradfold.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "settings": dict(settings),
        "results": dict(results),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
