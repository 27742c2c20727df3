"""Process-wide state per coroutine: random numbers, default dtype, determinism, back ends of attention.

`torch.random.fork_rng`, `sdpa_kernel` and the like change it for a block, in which other forward passes get their turn.
Random numbers of the first go on with the caller's, those of others begin at seeds derived from them, since states that
several pass on to each other cannot be forked. Where one ends before the next begins, they go on from each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from gradfold.state.rng import RandomState
from gradfold.torch_private import PROCESS_SETTINGS, apply_settings, read_settings


class GlobalState:
    """The caller's state, which a `with` block restores; random numbers go on where no forward pass has been."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({tensor.device: tensor for tensor in tensors}.values())  # random numbers of their devices
        self._began: dict[int, RandomState] = {}  # of each forward pass
        self._paused: dict[int, tuple[list[Any], RandomState]] = {}  # at the end of its last turn
        self._last_in_order = 0  # the last forward pass that began where all before it had ended
        self.num_ended = 0  # forward passes

    def __enter__(self) -> None:
        self._caller, self._settings = RandomState.record(self._tensors), read_settings(PROCESS_SETTINGS)

    def __exit__(self, *error: object) -> None:
        apply_settings(PROCESS_SETTINGS, self._settings)
        if not any(error) and self._paused:
            last = self._paused[self._last_in_order][1]
            are_unused = (random.is_same(self._began[number]) for number, (_, random) in self._paused.items())
            if last.is_same(self._caller) and not all(are_unused):
                last = self._caller.derived(len(self._paused))
            last.restore()

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """In this block one forward pass has its own state."""
        if number in self._paused:
            settings, random = self._paused[number]
            apply_settings(PROCESS_SETTINGS, settings)
            if random.has_moved():
                random.restore()
        else:
            if number == self.num_ended:
                self._last_in_order = number
            else:
                self._caller.derived(number).restore()
            self._began[number] = RandomState.record(self._tensors)
        try:
            yield
        finally:
            self._paused[number] = read_settings(PROCESS_SETTINGS), RandomState.record(self._tensors)
            apply_settings(PROCESS_SETTINGS, self._settings)
