"""How much do ranks say to each other in a window, and does it grow with their number?

python -m benchmarks.ranks.messages
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from torch.nn.parallel import DistributedDataParallel

import gradfold
from benchmarks.paired import write
from benchmarks.ranks.run import loss_fn

QUESTION = "How much do ranks say to each other in a window, beside the gradients, and does it grow with their number?"
REAL, FAKE = (2, 4), (8, 64, 512, 4096)
NUM_LAYERS = 500  # 1,000 parameters
RESULT = Path(__file__).parent / "results" / "messages.json"


@dataclass
class Count:
    """What one rank sends and receives: collectives, and bytes that it gets from them."""

    collectives: int = 0
    bytes: int = 0
    gradient_bytes: int = 0


@dataclass
class Counter:
    """Counts the collectives of this rank; in a fake group it answers for ranks that are all like this one."""

    size: int
    is_fake: bool
    count: Count = field(default_factory=Count)

    @contextmanager
    def counting(self) -> Iterator[Count]:
        """Count what the body sends."""
        self.count = Count()
        counted = {
            "all_reduce": partial(self._reduce, c10d.all_reduce),
            "all_gather": partial(self._gather, c10d.all_gather),
        }
        with mock.patch.multiple(c10d, **counted), mock.patch.multiple(dist, **counted):
            yield self.count

    def _reduce(
        self, collective: Callable[..., Any], tensor: Tensor, op: Any = dist.ReduceOp.SUM, **options: Any
    ) -> Any:
        if tensor.dtype == torch.float32:  # no other message is
            self.count.gradient_bytes += tensor.nbytes
        else:
            self.count.collectives += 1
            self.count.bytes += tensor.nbytes
        work = collective(tensor, op, **options)
        if self.is_fake and op == dist.ReduceOp.SUM:
            tensor.mul_(self.size)
        return work

    def _gather(
        self, collective: Callable[..., Any], of_all: list[Tensor], own: Tensor, *args: Any, **options: Any
    ) -> Any:
        self.count.collectives += 1
        self.count.bytes += own.nbytes * self.size
        work = collective(of_all, own, *args, **options)
        if self.is_fake:
            for one in of_all:
                one.copy_(own)
        return work


def count(size: int, is_fake: bool) -> dict[str, Any]:
    """Count in the first window of an accumulator, and in the third."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(NUM_LAYERS)]
    model = DistributedDataParallel(nn.Sequential(*layers))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, self_check=False)
    batch = torch.randn(4, 4), torch.randint(0, 4, (4,))
    counter, found = Counter(size, is_fake), {}
    for number in 1, 2, 3:
        with counter.counting() as counted:
            accumulator.backward(batch)
        found[number] = asdict(counted)
    return {"first window": found[1], "later windows": found[3]}


def work(rank: int, size: int, folder: str, backend: str = "gloo") -> None:
    """One process; rank 0 leaves what it counted in a file."""
    torch.set_num_threads(1)
    if backend == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    else:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/{size}", size), rank=rank, world_size=size)
    found = count(size, backend == "fake")
    if rank == 0:
        torch.save(found, f"{folder}/{size}.pt")
    dist.destroy_process_group()


def main() -> None:
    """Count with real and with fake ranks, print and write."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in (*REAL, *FAKE):
            num_processes, backend = (size, "gloo") if size in REAL else (1, "fake")
            mp.spawn(work, args=(size, folder, backend), nprocs=num_processes)  # type: ignore[attr-defined, no-untyped-call]
            results[f"{size} ranks, {'real' if size in REAL else 'fake'}"] = torch.load(f"{folder}/{size}.pt")
    for name, windows in results.items():
        print(f"{name:18s} {windows['later windows']}, first window: {windows['first window']}")
    write(RESULT, QUESTION, {"parameters": 2 * NUM_LAYERS, "micro_batches": 2}, results)


if __name__ == "__main__":
    main()
