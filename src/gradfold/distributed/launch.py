"""Launch: how processes that were started together find each other, and how a command starts them.

Ranks come from torchrun's environment variables: https://docs.pytorch.org/docs/stable/elastic/run.html.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gradfold.distributed.process_group import ProcessGroup
from gradfold.distributed.torch_private import fake_store

_AS_LONG_AS_IT_TAKES = timedelta(days=30)  # ranks may wait for one that trains alone
INTERRUPTED = 130  # what shells report after Ctrl-C


@dataclass(frozen=True)
class RankInfo:
    """The rank of this process among those that were started with it, `local_rank` among those on this machine."""

    rank: int
    size: int
    local_rank: int


def find_rank_info() -> RankInfo | None:
    """The rank that torchrun gave this process; None where it was started alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    return RankInfo(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))


def is_first() -> bool:
    """Whether this is the process that prints for all."""
    place = find_rank_info()
    return place is None or place.rank == 0


@contextmanager
def _process_group(backend: str, **options: Any) -> Iterator[ProcessGroup]:
    dist.init_process_group(backend, **options)
    try:
        assert dist.group.WORLD is not None
        yield ProcessGroup(dist.group.WORLD, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def launched_process_group() -> AbstractContextManager[ProcessGroup]:
    """A process group of all that were started together, on their processors, for as long as the block runs."""
    return _process_group("gloo", timeout=_AS_LONG_AS_IT_TAKES)


def child_process_group(place: RankInfo, name: str) -> AbstractContextManager[ProcessGroup]:
    """A process group of one child of each of them, which they have started under the same name."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    clients = dist.TCPStore(host, port, is_master=False)  # type: ignore[attr-defined]
    store = dist.PrefixStore(f"gradfold/{attempt}/{name}", clients)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    return _process_group(backend, store=store, rank=place.rank, world_size=place.size)


def fake_process_group(num_ranks: int) -> AbstractContextManager[ProcessGroup]:
    """A process group of this process and others that do not exist, for models that are inspected but not run.

    Collectives send nothing. Source: the backend "fake" of torch's own tests.
    """
    return _process_group("fake", rank=0, world_size=num_ranks, store=fake_store())


def in_parallel(model: nn.Module) -> nn.Module:
    """The model for all processes of the default group, each with its own rows."""
    return nn.parallel.DistributedDataParallel(model)


def launch(arguments: Sequence[str], num_ranks: int) -> int:
    """Run `python ARGUMENTS` in this many processes, as torchrun does on one machine; returns their exit code.

    The processors are divided among them, unless `OMP_NUM_THREADS` is set.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # ranks say themselves what has failed
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    except SignalException:
        return INTERRUPTED
    return 0
