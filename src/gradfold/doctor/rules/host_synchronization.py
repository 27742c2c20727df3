"""GF012: the host waits for the device in every micro-batch."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.events import Read
from gradfold.doctor.finding import LIKELY, NOTE, Observation
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []

_PER_MICRO_BATCH = 0.8  # share of micro-batches with a read


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.accumulating:
        by_line: dict[tuple[str, int], list[Read]] = {}
        for read in case.events(Read):
            by_line.setdefault((read.place.file, read.place.line), []).append(read)
        for reads in by_line.values():
            if _share(training, reads) >= _PER_MICRO_BATCH:
                yield _observation(case, training, reads)


def _share(training: OptimizerHistory, reads: list[Read]) -> float:
    """Of the micro-batches within windows, those with a read before the next one's backward pass."""
    numbers = {read.num_backwards for read in reads}
    micro = [one for window in training.accumulating for one in window.micro_batches]
    before = sum(one.index in numbers for one in micro)
    after = sum(one.index + 1 in numbers for one in micro)
    return max(before, after) / max(len(micro), 1)


def _observation(case: RunRecord, training: OptimizerHistory, reads: list[Read]) -> Observation:
    seconds = sum(read.seconds for read in reads if read.at >= case.since)
    call = reads[0].call.strip("_")
    shown = f".{call}()" if not reads[0].call.startswith("_") else f"{call}(tensor)"
    micro = sum(len(window) for window in training.accumulating)
    if reads[0].device == "cpu":
        cost = (
            f"On this CPU that took {seconds * 1e3:.3g} ms of {case.seconds:.3g} s; on a GPU each waits until "
            "everything before it is done, and the GPU then idles until the next micro-batch is launched."
        )
    else:
        share = f"{seconds:.3g} s of {case.seconds:.3g} s ({seconds / case.seconds:.0%})"
        cost = f"It waited {share} for the {reads[0].device}."
    return Observation(
        reads[0].place,
        f"`{shown}` makes the host read what the device computed, in every one of {micro} micro-batches. {cost}",
        "Add up on the device (`total += loss.detach()`) and read once per update.",
        LIKELY if reads[0].device == "cpu" else "certain",
    )


RULE = Rule(
    code="GF012",
    name="host synchronization per micro-batch",
    severity=NOTE,
    what="`.item()`, `.tolist()`, `.cpu()`, `.numpy()`, `float(loss)` or `if tensor:` on what the model computed, in "
    "every micro-batch of a window.",
    why="A GPU works ahead of Python. To read a number the host must wait until all before it is done; then the GPU "
    "waits for Python. With the small kernels of micro-batches that is a good part of the time. The loss is needed "
    "once per update.",
    detection="A line of the script (no library's) reads a tensor on a device, or on the CPU one that depends on the "
    "model's output, in at least 80 % of the micro-batches of windows; the time it took is measured.",
    limits="On a CPU nothing waits, and what a line reads is told from the names on it; so it is only *likely* there, "
    "and a detached loss read in another function is not seen. Loops without accumulation are left alone.",
    wrong="""(loss / 4).backward()
running_loss += loss.item()
""",
    right="""(loss / 4).backward()
running_loss += loss.detach()
if (i + 1) % 4 == 0:
    log(running_loss.item())
""",
    check=_check,
)
