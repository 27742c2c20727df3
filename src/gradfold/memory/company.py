"""The company of a process while a micro-batch size is looked for: none, or ranks that search in step.

Where each rank holds a part of every parameter, no forward pass of one runs without the others. So all try the same
sizes at the same time, by the same clock, and choose the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from gradfold.errors import RanksError
from gradfold.ranks import Ranks

__all__: list[str] = []

T = TypeVar("T")


class Company:
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


class InStep(Company):
    """Several, all of which come to every call.

    Args:
        ranks: these.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.size = ranks.size

    def attempt(self, decide: Callable[[], T]) -> T:
        """What this rank decides; where one fails, all do.

        Raises:
            RanksError: another rank has failed.
            Exception: this one has.
        """
        try:
            decided = decide()
        except BaseException as error:
            self._ranks.exchange(f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self._ranks.exchange("")):
            if failure:
                raise RanksError(f"rank {rank} failed while a micro-batch size was looked for. {failure}")
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
