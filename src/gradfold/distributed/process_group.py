"""The ranks: the processes that train together. Sums over them, and what each has to tell the others.

`torch.distributed` does the work: https://docs.pytorch.org/docs/stable/distributed.html.

The company of a process while a micro-batch size is looked for: none, or ranks that search in step.

Where each rank holds a part of every parameter, no forward pass of one runs without the others. So all try the same
sizes at the same time, by the same clock, and choose the same.
"""

from __future__ import annotations

import atexit
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gradfold.errors import DistributedError

__all__: list[str] = []

_BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel's

T = TypeVar("T")

_sent: deque[list[Tensor]] = deque(maxlen=4)  # in the last meetings
_PATIENCE_S = 1.0


@atexit.register
def wait_for_threads() -> None:
    """Before Python ends, let threads of a backend drop the tensors that were sent last.

    To drop a tensor they need Python, and a thread of gloo that comes for it too late aborts the process ("terminate
    called without an active exception", torch 2.13), where `destroy_process_group` has not ended them: not after a
    DistributedDataParallel.
    """
    end = time.monotonic() + _PATIENCE_S
    while any(_is_held(tensor) for tensors in _sent for tensor in tensors) and time.monotonic() < end:
        time.sleep(0.001)


def _is_held(tensor: Tensor) -> bool:
    """Whether others than Python hold it."""
    return tensor._use_count() > 1  # type: ignore[attr-defined, no-any-return]


class ProcessGroup:
    """The processes of one group, each with rows of its own.

    Args:
        group: a process group of torch.distributed.
        device: where collectives of this group take tensors from: that of the model.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._device = device

    def begin_gather(self, numbers: Sequence[float]) -> Callable[[], list[list[float]]]:
        """Begin to collect these numbers from every rank; the function that comes back waits for them, by rank."""
        own = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        of_all = [torch.empty_like(own) for _ in range(self.size)]
        _sent.append([own, *of_all])
        work = dist.all_gather(of_all, own, group=self.group, async_op=True)

        def wait() -> list[list[float]]:
            work.wait()
            rows: list[list[float]] = torch.stack(of_all).tolist()
            return rows

        return wait

    def exchange(self, value: T) -> list[T]:
        """What every rank has to tell, in the order of ranks; anything that can be pickled."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def gather(self, own: Tensor) -> list[Tensor]:
        """A tensor of the same shape and dtype from every rank, in the order of ranks."""
        of_all = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(of_all, own.contiguous(), group=self.group)
        return of_all

    def sum(self, own: Tensor) -> Tensor:
        """Their sum, the same bits on every rank."""
        total = own.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def fill_in(self, whole: Tensor, counts: Sequence[int]) -> None:
        """Every rank has its own rows of a contiguous tensor, `counts` by rank: fill in those of the others."""
        start = 0
        for rank, count in enumerate(counts):
            rows = whole[start : start + count]
            start += count
            if rows.numel():
                # As bytes, since not every backend sends every dtype.
                dist.broadcast(rows.view(-1).view(torch.uint8), group=self.group, group_src=rank)

    def add_up(self, tensor: Tensor) -> None:
        """The sum over all ranks, in place; the same bits on each."""
        dist.all_reduce(tensor, group=self.group)

    def all_well(self, is_well: bool) -> bool:
        """Whether all ranks are."""
        return not any(failed for (failed,) in self.begin_gather([0.0 if is_well else 1.0])())


class Reduction:
    """Sums gradients over ranks, a bucket at a time, in memory that it has before it begins.

    So that memory cannot run out on one rank while the others wait for it.
    """

    def __init__(self, ranks: ProcessGroup, parameters: Iterable[Tensor]) -> None:
        self._group = ranks.group
        self.num_reductions = 0
        num_elements: dict[tuple[torch.dtype, torch.device], int] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                key = parameter.grad_dtype or parameter.dtype, parameter.device
                num_elements[key] = num_elements.get(key, 0) + parameter.numel()
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

    def _sum_together(self, bucket: Tensor, gradients: Sequence[Tensor]) -> None:
        sizes = [gradient.numel() for gradient in gradients]
        flat = bucket[: sum(sizes)]
        parts = [part.view(one.shape) for part, one in zip(torch.split(flat, sizes), gradients, strict=True)]
        torch._foreach_copy_(parts, list(gradients))
        dist.all_reduce(flat, group=self._group)
        torch._foreach_copy_(list(gradients), parts)
        self.num_reductions += 1


class LocalGroup:
    """That of one process, which decides by itself: none.

    Attributes:
        size: how many processes decide together.
    """

    size = 1

    def attempt(self, decide: Callable[[], T]) -> T:
        """What it decides."""
        return decide()

    def gather(self, value: T) -> list[T]:
        """What every process has to say."""
        return [value]

    def clock(self) -> float:
        """The seconds that pass."""
        return time.perf_counter()

    def stopwatch(self, device: torch.device) -> Callable[[], float]:
        """What times a step: where one thread does all the work its own time, in which no other program has a part."""
        is_busy = device.type == "cpu" and torch.get_num_threads() == 1
        return time.thread_time if is_busy else time.perf_counter


class SynchronizedGroup(LocalGroup):
    """Several, all of which come to every call.

    Args:
        ranks: these.
    """

    def __init__(self, ranks: ProcessGroup) -> None:
        self._ranks = ranks
        self.size = ranks.size

    def attempt(self, decide: Callable[[], T]) -> T:
        """What this rank decides; where one fails, all do.

        Raises:
            DistributedError: another rank has failed.
            Exception: this one has.
        """
        try:
            decided = decide()
        except BaseException as error:
            self._ranks.exchange(f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self._ranks.exchange("")):
            if failure:
                raise DistributedError(f"rank {rank} failed while a micro-batch size was looked for. {failure}")
        return decided

    def gather(self, value: T) -> list[T]:
        """What every rank has to say, in the order of ranks."""
        return self._ranks.exchange(value)

    def clock(self) -> float:
        """The seconds that pass for the first rank, which waits for the others in every pass."""
        return self._ranks.begin_gather([time.perf_counter()])()[0][0]

    def stopwatch(self, device: torch.device) -> Callable[[], float]:
        """The same clock: waiting counts."""
        return self.clock
