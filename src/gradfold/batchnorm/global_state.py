"""Process-wide state per coroutine: random numbers, default dtype, determinism, back ends of attention.

`torch.random.fork_rng`, `sdpa_kernel` and the like change it for a block, in which other forward passes get their turn.
Random numbers of the first go on with the caller's, those of others begin at seeds derived from them, since states that
several pass on to each other cannot be forked. Where one ends before the next begins, they go on from each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from gradfold.batchnorm.torch_private import apply_settings, read_settings
from gradfold.state.rng import RandomState


class _Paused(NamedTuple):
    """The state at the end of a turn, and the random state before the first one."""

    settings: list[Any]
    random: RandomState
    first: RandomState


class GlobalState:
    """The caller's state, which a `with` block restores; random numbers go on where no forward pass has been.

    Args:
        tensors: on the devices whose random numbers count.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list({tensor.device: tensor for tensor in tensors}.values())
        self._paused: dict[int, _Paused] = {}
        self._last_in_order = 0  # the last forward pass that began where all before it had ended
        self.num_ended = 0  # forward passes

    def __enter__(self) -> GlobalState:
        self._begin, self._settings = RandomState.record(self._tensors), read_settings()
        return self

    def __exit__(self, *error: object) -> None:
        apply_settings(self._settings)
        if not any(error) and self._paused:
            last = self._paused[self._last_in_order].random
            if last.is_same(self._begin) and not all(one.random.is_same(one.first) for one in self._paused.values()):
                last = self._begin.derived(len(self._paused))
            last.restore()

    @contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """In this block one forward pass has its own state."""
        before = self._paused.get(number)
        if before is not None:
            apply_settings(before.settings)
            if before.random.has_moved():
                before.random.restore()
        elif number == self.num_ended:
            self._last_in_order = number
        else:
            self._begin.derived(number).restore()
        first = RandomState.record(self._tensors) if before is None else before.first
        try:
            yield
        finally:
            self._paused[number] = _Paused(read_settings(), RandomState.record(self._tensors), first)
            apply_settings(self._settings)
