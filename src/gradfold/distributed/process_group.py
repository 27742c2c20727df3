"""A process group: the processes that train together, sums over them, and the values that they exchange.

`torch.distributed` does the work: https://docs.pytorch.org/docs/stable/distributed.html.
"""

from __future__ import annotations

import atexit
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gradfold.distributed.torch_private import is_shared
from gradfold.errors import DistributedError
from gradfold.torch_private import foreach_copy

is_initialized: Callable[[], bool] = dist.is_initialized if dist.is_available() else bool
"""Whether this process has a process group; False where torch was built without."""

_BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel's

T = TypeVar("T")

_sent: list[Tensor] = []  # that a backend may still hold
_PATIENCE_S = 1.0


@atexit.register
def wait_for_threads() -> None:
    """Before Python ends, let threads of a backend drop the tensors that were sent last.

    To drop a tensor they need Python, and a thread of gloo that comes for it too late aborts the process ("terminate
    called without an active exception", torch 2.13), where `destroy_process_group` has not ended them: not after a
    DistributedDataParallel.
    """
    end = time.monotonic() + _PATIENCE_S
    while any(map(is_shared, _sent)) and time.monotonic() < end:
        time.sleep(0.001)


def _keep(tensors: list[Tensor]) -> None:
    """Keep what is about to be sent until no backend holds it."""
    _sent[:] = [*filter(is_shared, _sent), *tensors]


def is_lost(error: RuntimeError) -> bool:
    """Whether an error of a collective says that another process cannot be reached."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text or "pair closure" in text


def sever(group: dist.ProcessGroup) -> None:
    """Close the connections of this process, so that no other one waits for it. The group is of no use after that.

    Last run with gloo. `abort` does nothing there, and has not run with NCCL, whose other processes go on waiting.
    """
    group.abort()
    if dist.get_backend(group) != "gloo":
        return
    for peer in range(dist.get_world_size(group)):
        if peer != dist.get_rank(group):
            with suppress(RuntimeError):  # gloo closes a connection on which nothing came in time
                receiving = dist.irecv(torch.empty(1), group=group, group_src=peer)
                receiving.wait(timedelta(milliseconds=1))  # type: ignore[union-attr]  # None outside of the group


class ProcessGroup:
    """The processes of one group, each with rows of its own; `device` is where collectives take tensors from."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._device = device

    def begin_gather(self, numbers: Sequence[float]) -> Callable[[], list[list[float]]]:
        """Begin to gather these numbers from every rank; the function that is returned waits for them, by rank."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        of_all = [torch.empty_like(own) for _ in range(self.size)]
        _keep([own, *of_all])
        work = dist.all_gather(of_all, own, group=self.group, async_op=True)

        def wait() -> list[list[float]]:
            work.wait()
            rows: list[list[float]] = torch.stack(of_all).tolist()
            return rows

        return wait

    def begin_sum(self, numbers: Sequence[float]) -> Callable[[], list[float]]:
        """Begin to sum numbers over all ranks; the function that is returned waits for the sums, the same on each."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        _keep([own])
        work = dist.all_reduce(own, group=self.group, async_op=True)

        def wait() -> list[float]:
            work.wait()
            sums: list[float] = own.tolist()
            return sums

        return wait

    def maximum(self, numbers: Tensor) -> Tensor:
        """The largest of every rank, in place, entry by entry."""
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.group)
        return numbers

    def broadcast(self, value: T, source: int) -> T:
        """The value of one rank, on all; anything that can be pickled."""
        values = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=source)
        return values[0]

    def exchange(self, value: T) -> list[T]:
        """One value of every rank, in the order of ranks; anything that can be pickled."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, own: Tensor) -> list[Tensor]:
        """A tensor of the same shape and dtype from every rank, in the order of ranks."""
        of_all = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(of_all, own.contiguous(), group=self.group)
        return of_all

    def broadcast_rows(self, whole: Tensor, counts: Sequence[int]) -> None:
        """Every rank has its own rows of a contiguous tensor, `counts` by rank: fill in those of the others."""
        start = 0
        for rank, count in enumerate(counts):
            rows = whole[start : start + count]
            start += count
            if rows.numel():
                # As bytes, since not every backend sends every dtype.
                dist.broadcast(rows.view(-1).view(torch.uint8), group=self.group, group_src=rank)

    def all_reduce(self, tensor: Tensor) -> None:
        """The sum over all ranks, in place; the same bits on each."""
        dist.all_reduce(tensor, group=self.group)


class Reduction:
    """Sums gradients over ranks, a bucket at a time, in memory that it has before it begins.

    So no rank can be out of memory while the others wait for it.
    """

    def __init__(self, ranks: ProcessGroup, parameters: Iterable[Tensor]) -> None:
        self._group = ranks.group
        self.num_reductions = 0
        num_elements: Counter[tuple[torch.dtype, torch.device]] = Counter()
        for parameter in parameters:
            if parameter.requires_grad:
                num_elements[parameter.grad_dtype or parameter.dtype, parameter.device] += parameter.numel()
        self._buckets = {
            (dtype, device): torch.empty(min(count, _BUCKET_BYTES // dtype.itemsize), dtype=dtype, device=device)
            for (dtype, device), count in num_elements.items()
        }

    @torch.no_grad()
    def run(self, gradients: Iterable[Tensor]) -> None:
        """Sum in place. Every rank must come with the same shapes in the same order, and gets the same bits."""
        waiting: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for gradient in gradients:
            key = gradient.dtype, gradient.device
            bucket = self._buckets.get(key)
            if gradient.is_sparse or bucket is None or gradient.numel() > bucket.numel():
                self._sum_alone(gradient)
                continue
            together = waiting.setdefault(key, [])
            if sum(one.numel() for one in together) + gradient.numel() > bucket.numel():
                self._sum_together(bucket, together)
                together.clear()
            together.append(gradient)
        for key, together in waiting.items():
            self._sum_together(self._buckets[key], together)

    def _sum_alone(self, gradient: Tensor) -> None:
        whole = gradient if gradient.is_sparse else gradient.contiguous()
        dist.all_reduce(whole, group=self._group)
        self.num_reductions += 1
        if whole is not gradient:
            gradient.copy_(whole)

    def _sum_together(self, bucket: Tensor, gradients: list[Tensor]) -> None:
        sizes = [gradient.numel() for gradient in gradients]
        flat = bucket[: sum(sizes)]
        parts = [part.view(one.shape) for part, one in zip(torch.split(flat, sizes), gradients, strict=True)]
        foreach_copy(parts, gradients)
        dist.all_reduce(flat, group=self._group)
        foreach_copy(gradients, parts)
        self.num_reductions += 1


class TuningGroup:
    """The processes that pick one micro-batch size together: one by itself (None), or ranks in step.

    Where each rank holds a shard of every parameter, no rank can run a forward pass alone. So all try the same sizes at
    the same time, by the same clock, and choose the same: every call is a collective.
    """

    def __init__(self, ranks: ProcessGroup | None = None) -> None:
        self._ranks = ranks
        self.size = 1 if ranks is None else ranks.size

    def attempt(self, decide: Callable[[], T]) -> T:
        """The result of a call on this rank; DistributedError where it fails on another one."""
        try:
            decided = decide()
        except BaseException as error:
            self.gather(f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self.gather("")):
            if failure:
                raise DistributedError(f"rank {rank} failed while micro-batch sizes were tried. {failure}")
        return decided

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in the order of ranks."""
        return [value] if self._ranks is None else self._ranks.exchange(value)

    def clock(self) -> float:
        """Seconds, of the first rank, which waits for the others in every pass."""
        now = time.perf_counter()
        return now if self._ranks is None else self._ranks.begin_gather([now])()[0][0]

    def stopwatch(self, device: torch.device) -> Callable[[], float]:
        """The clock for a step: CPU time where one thread does all the work, so other programs have no part in it."""
        is_one_thread = self._ranks is None and device.type == "cpu" and torch.get_num_threads() == 1
        return time.thread_time if is_one_thread else self.clock
