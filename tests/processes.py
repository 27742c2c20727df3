"""Real processes in a process group on this machine (gloo): one set per size, started once and used by every test."""

from __future__ import annotations

import functools
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
# One server for all tests of a process. torch._dynamo is what a process's first optimizer imports, in two seconds.
_PRELOADED = ["gradfold", "gradfold.doctor.diagnose", "torch.distributed", "torch.nn.parallel", "torch._dynamo"]
CONTEXT.set_forkserver_preload(_PRELOADED)
TIMEOUT_S = 60
COLLECTIVE_TIMEOUT_S = 20  # a rank that waits in vain gets an error, which no test expects
FAST = 3  # the world size of the fast tier


def run(function, size, *args, timeout_s=TIMEOUT_S):
    """`function(rank, size, *args)` on each of `size` ranks: their results by rank."""
    return _processes(size).run(function, *args, timeout_s=timeout_s)


def world(size):
    """The marks of tests on `size` ranks: pytest-xdist runs them in one worker, which starts the processes once."""
    group = pytest.mark.xdist_group(f"world-{size}")
    return [group] if size == FAST else [group, pytest.mark.slow]


def worlds(*params):
    """Parameters of a fixture whose first, or only, value is the world size."""
    return [pytest.param(one, marks=world(one[0] if isinstance(one, tuple) else one)) for one in params]


class _Processes:
    """Processes that run one function after another, each as the ranks of a new process group."""

    def __init__(self, size):
        self.size = size
        self.running = []  # (process, connection) by rank

    def run(self, function, *args, timeout_s):
        if not self.running:
            self.running = [self._start(rank) for rank in range(self.size)]
        with tempfile.TemporaryDirectory() as folder:
            try:
                for _, connection in self.running:
                    connection.send((f"{folder}/store", function, args))
                return self._receive(time.monotonic() + timeout_s)
            except BaseException:  # ranks may be anywhere: the next function gets new processes
                self.stop()
                raise

    def _start(self, rank):
        connection, of_child = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_serve, args=(rank, self.size, of_child), daemon=True)
        process.start()
        of_child.close()
        return process, connection

    def _receive(self, deadline):
        hanging = [
            rank for rank, (_, one) in enumerate(self.running) if not one.poll(max(0, deadline - time.monotonic()))
        ]
        assert not hanging, f"ranks {hanging} hang"
        results = [torch.load(io.BytesIO(one.recv_bytes()), weights_only=False) for _, one in self.running]
        for result in results:
            if isinstance(result, _Failure):
                raise RuntimeError(str(result))
        return results

    def stop(self):
        for process, connection in self.running:
            connection.close()
            process.kill()
        self.running = []


class _Failure(str):
    """The traceback of a function that failed on a rank."""


@functools.cache
def _processes(size):
    return _Processes(size)


def _serve(rank, size, connection):
    """What a process does: functions, in the environment and with the seed that every test starts from."""
    torch.set_num_threads(1)
    while True:
        store, function, args = connection.recv()
        with mock.patch.dict(os.environ):
            torch.manual_seed(0)
            result = _run(rank, size, store, function, args)
        file = io.BytesIO()
        torch.save(result, file)
        connection.send_bytes(file.getvalue())


def _run(rank, size, store, function, args):
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timeout)
    try:
        return function(rank, size, *args)
    except BaseException as error:
        return _Failure("".join(traceback.format_exception(error)))
    finally:
        dist.destroy_process_group()
