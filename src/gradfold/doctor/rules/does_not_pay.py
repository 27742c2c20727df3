"""GF017: accumulation that does not pay, since memory would hold the whole batch."""

from __future__ import annotations

from collections.abc import Iterator

from gradfold.doctor.finding import LIKELY, NOTE, Observation
from gradfold.doctor.history import RunRecord
from gradfold.doctor.rules.rule import Rule

__all__: list[str] = []

_LEAST_BYTES = 64 * 2**20  # of activations of a whole batch; below, the script is a demonstration
_MOST_SHARE = 0.5  # of the memory there is


def _check(case: RunRecord) -> Iterator[Observation]:
    for training in case.accumulating:
        some = [one for window in training.full for one in window.micro_batches]
        looked = [one.census for one in some if one.census is not None and one.census.is_whole]
        kept = max((one.activation_bytes for one in looked), default=0)
        n, memory = training.usual, case.memory
        whole = memory.peak_bytes + (n - 1) * kept
        if n * kept < _LEAST_BYTES or not memory.available_bytes or whole > _MOST_SHARE * memory.available_bytes:
            continue
        if any(one.syncs for one in some):
            continue  # on several ranks it also saves communication
        yield Observation(
            some[0].place,
            f"memory would hold the whole batch: the peak was {memory.peak_bytes / 1e9:.3g} GB, a micro-batch keeps "
            f"{kept / 1e6:.3g} MB for its backward pass, so that {n} at once need about {whole / 1e9:.3g} GB of "
            f"{memory.available_bytes / 1e9:.3g} GB. Accumulation saves nothing that is scarce, and runs the smaller, "
            "less efficient micro-batches.",
            f"Try a batch {n} times as large without accumulation, with the same learning rate: the update is the "
            "same.",
            LIKELY,
        )


RULE = Rule(
    code="GF017",
    name="accumulation that does not pay",
    severity=NOTE,
    what="A batch is cut into micro-batches, although the whole would take less than half of the memory there is.",
    why="Accumulation trades time for memory: small micro-batches use a device less well and cost launches. Where "
    "memory is not scarce it is only slower.",
    detection="The peak of memory is measured, and what the graph of one micro-batch keeps for its backward pass is "
    "counted, parameters apart. Peak plus (n - 1) times that is compared with half of what the device, the container "
    "or the process's limits allow.",
    limits="Whole batches that keep less than 64 MiB are demonstrations, and are not judged; neither are models under "
    "DistributedDataParallel, where accumulation saves communication, nor graphs with packed tensors (checkpointing). "
    "Larger micro-batches may need more workspace than the sum.",
    wrong="""loader = DataLoader(data, batch_size=8)  # on 80 GB, of which 4 are used
(criterion(model(x), y) / 8).backward()
""",
    right="""loader = DataLoader(data, batch_size=64)
criterion(model(x), y).backward()
""",
    check=_check,
)
