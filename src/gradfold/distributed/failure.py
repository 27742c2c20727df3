"""A rank that fails where the others are in a collective, so that nothing can be exchanged with them."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch.distributed as dist

from gradfold.distributed.process_group import ProcessGroup, is_lost, sever
from gradfold.distributed.torch_private import default_store
from gradfold.errors import DistributedError

IN_STEP_S = 10.0
"""How far apart ranks may be that fail at the same place."""


def settle_failure(ranks: ProcessGroup, groups: Iterable[dist.ProcessGroup], error: BaseException, where: str) -> None:
    """Wait until all ranks have failed; where they do not, end the training on all, also in these other groups.

    A rank can tell the others nothing there but by the store, and that it is gone.

    Raises:
        DistributedError: another rank was the first to fail, and the reason why this one did.
    """
    store = default_store()
    key = f"gradfold/{ranks.group.group_name}"
    ended = f"in {where}, where ranks wait for each other, so the training has ended on all; go on from a checkpoint."
    is_first = not (isinstance(error, RuntimeError) and is_lost(error))
    if is_first:
        num_failed = store.add(f"{key}/failed", 1)
        num_when_alike = -(-num_failed // ranks.size) * ranks.size  # with those of earlier faults that all ranks had
        deadline = time.monotonic() + IN_STEP_S
        while store.add(f"{key}/failed", 0) < num_when_alike and time.monotonic() < deadline:
            time.sleep(0.005)
        if store.add(f"{key}/failed", 0) >= num_when_alike:
            return
        store.set(f"{key}/text", f"rank {ranks.rank} has failed {ended} {type(error).__name__}: {error}")
    for one in {id(one): one for one in (ranks.group, *groups)}.values():
        sever(one)
    if not is_first:
        is_told = store.check([f"{key}/text"])
        text = store.get(f"{key}/text").decode() if is_told else f"another rank cannot be reached {ended}"
        raise DistributedError(text) from error
