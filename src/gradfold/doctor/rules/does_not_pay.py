"""GF017: accumulation that does not pay (note).

A batch is split into micro-batches, although the whole would take less than half of the available memory.

Why: Accumulation trades time for memory: small micro-batches use a device less well and cost kernel launches. Where
memory is not scarce it is only slower.
Detection: The peak of memory is measured, and what the graph of one micro-batch keeps for its backward pass is counted,
without parameters. Peak plus (n - 1) times that is compared with half of what the device, the container or the
process's limits allow.
Limits: Whole batches that keep less than 64 MiB count as demonstrations and are not judged; neither are models under
DistributedDataParallel, where accumulation saves communication, nor graphs with packed tensors (checkpointing). Larger
micro-batches may need more workspace than the sum.

Fix:
- loader = DataLoader(data, batch_size=8)  # on 80 GB, of which 4 are used
- (criterion(model(x), y) / 8).backward()
+ loader = DataLoader(data, batch_size=64)
+ criterion(model(x), y).backward()
"""

from __future__ import annotations

from gradfold.doctor.history import RunRecord
from gradfold.doctor.rule import Violation, Violations

_LEAST_BYTES = 64 * 2**20  # of activations of a whole batch; below, the script is a demonstration
_MOST_SHARE = 0.5  # of the available memory


def check(record: RunRecord) -> Violations:
    for history in record.accumulating:
        some = [one for window in history.full for one in window.micro_batches]
        kept = max((one.graph.activation_bytes for one in some if one.graph.is_whole), default=0)
        n, memory = history.window_length, record.memory
        whole = memory.peak_bytes + (n - 1) * kept
        if n * kept < _LEAST_BYTES or not memory.available_bytes or whole > _MOST_SHARE * memory.available_bytes:
            continue
        if any(one.ddp for one in some):
            continue  # on several ranks it also saves communication
        yield Violation(
            some[0].location,
            f"memory would hold the whole batch: the peak was {memory.peak_bytes / 1e9:.3g} GB and a micro-batch keeps "
            f"{kept / 1e6:.3g} MB for its backward pass, so {n} at once need about {whole / 1e9:.3g} GB of "
            f"{memory.available_bytes / 1e9:.3g} GB. Accumulation saves no scarce memory, and its small micro-batches "
            "are less efficient.",
            f"Try a batch {n} times as large without accumulation, with the same learning rate: the update is the "
            "same.",
            "likely",
        )
