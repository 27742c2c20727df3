"""Several real processes in a process group, on this machine, with gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# One server for all tests of a process. torch._dynamo is what a process's first optimizer imports, in two seconds.
_PRELOADED = ["gradfold", "gradfold.doctor.diagnose", "torch.distributed", "torch.nn.parallel", "torch._dynamo"]
CONTEXT.set_forkserver_preload(_PRELOADED)
TIMEOUT_S = 60
COLLECTIVE_TIMEOUT_S = 20  # a rank that waits in vain gets an error, which no test expects


def run(function, size, *args, timeout_s=TIMEOUT_S):
    """`function(rank, size, *args)` in each of `size` processes; their results in order, exceptions as such."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [CONTEXT.Process(target=_run, args=(function, rank, size, folder, args)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        assert not hanging, f"ranks {hanging} hang"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _run(function, rank, size, folder, args):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    )
    try:
        result = function(rank, size, *args)
    except BaseException as error:
        result = RuntimeError("".join(traceback.format_exception(error)))
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
