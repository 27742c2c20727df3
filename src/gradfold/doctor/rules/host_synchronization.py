"""GF012: host synchronization per micro-batch (note).

`.item()`, `.tolist()`, `.cpu()`, `.numpy()`, `float(loss)` or `if tensor:` on what the model computed, in every
micro-batch of a window.

Why: A GPU works ahead of Python. To read a number the host must wait until everything before it is done; then the GPU
waits for Python. With the small kernels of micro-batches that is a good part of the time. The loss is needed once per
update.
Detection: In at least 80 % of the micro-batches of windows, a line of the script (not of a library) reads a tensor on a
device, or on the CPU one that depends on the model's output. The time is measured.
Limits: On a CPU nothing waits, and the names on a line tell what it reads; the finding is only *likely* there, and a
detached loss read in another function is not seen. Loops without accumulation are not judged.

Fix:
  (loss / 4).backward()
- running_loss += loss.item()
+ running_loss += loss.detach()
+ if (i + 1) % 4 == 0:
+     log(running_loss.item())
"""

from __future__ import annotations

from collections import defaultdict

from gradfold.doctor.events import Read
from gradfold.doctor.history import OptimizerHistory, RunRecord
from gradfold.doctor.rule import Violation, Violations

_PER_MICRO_BATCH = 0.8  # share of micro-batches with a read


def check(record: RunRecord) -> Violations:
    by_line: dict[tuple[str, int], list[Read]] = defaultdict(list)
    for read in record.log.of(Read):
        by_line[read.location.file, read.location.line].append(read)
    for history in record.accumulating:
        for reads in by_line.values():
            if _share(history, reads) >= _PER_MICRO_BATCH:
                yield _violation(record, history, reads)


def _share(history: OptimizerHistory, reads: list[Read]) -> float:
    """Of the micro-batches within windows, those with a read before the next one's backward pass."""
    numbers = {read.num_backwards for read in reads}
    before = sum(one.index in numbers for one in history.micro_batches)
    after = sum(one.index + 1 in numbers for one in history.micro_batches)
    return max(before, after) / max(len(history.micro_batches), 1)


def _violation(record: RunRecord, history: OptimizerHistory, reads: list[Read]) -> Violation:
    seconds = sum(read.seconds for read in reads if read.at >= record.since)
    first, count = reads[0], len(history.micro_batches)
    shown = f"{first.call.strip('_')}(tensor)" if first.call.startswith("_") else f".{first.call}()"
    if first.device == "cpu":
        cost = (
            f"On this CPU that took {seconds * 1e3:.3g} ms of {record.seconds:.3g} s; on a GPU each waits until "
            "everything before it is done, and the GPU then idles until the next micro-batch is launched."
        )
    else:
        share = f"{seconds:.3g} s of {record.seconds:.3g} s ({seconds / record.seconds:.0%})"
        cost = f"It waited {share} for the {first.device}."
    return Violation(
        first.location,
        f"`{shown}` makes the host read what the device computed, in every one of {count} micro-batches. {cost}",
        "Accumulate on the device (`total += loss.detach()`) and read once per update.",
        "likely" if first.device == "cpu" else "certain",
    )
