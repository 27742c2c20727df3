"""Random state: torch's generators, on the CPU and on a model's devices, as one value; and those of Python and numpy.

In a window numpy's and Python's generators and custom ones are the user's; a probe puts them back, too.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold.torch_private import without_dispatch

CPU = torch.device("cpu")


class RandomState(NamedTuple):
    """States of torch's default generators; restoring them makes the same numbers be drawn again."""

    by_device: tuple[tuple[torch.device, Tensor], ...]

    @classmethod
    def record(cls, tensors: Iterable[Tensor]) -> RandomState:
        """The states now, of the CPU and of the accelerators that hold some of `tensors`."""
        # Reading a state copies it on the host; on CUDA it is a seed and an offset, without waiting for the device.
        devices = {tensor.device for tensor in tensors if not tensor.is_cpu and not tensor.is_meta}
        return cls(tuple((device, _state(device)) for device in (CPU, *filter(_has_state, devices))))

    def has_moved(self) -> bool:
        """Whether some generator is in another state now."""
        return any(not _is_same(state, _state(device)) for device, state in self.by_device)

    def is_same(self, other: RandomState) -> bool:
        """Whether both are of the same generators in the same states."""
        pairs = zip(self.by_device, other.by_device, strict=True)
        return all(_is_same(own, theirs) for (_, own), (_, theirs) in pairs)

    def derived(self, number: int) -> RandomState:
        """States of other generators, seeded by these and a number."""
        text = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8)
        with without_dispatch():
            for _, state in self.by_device:
                text.update(state.numpy().tobytes())
        seed = int.from_bytes(text.digest(), "little", signed=True)
        seeded = ((device, torch.Generator(device).manual_seed(seed).get_state()) for device, _ in self.by_device)
        return RandomState(tuple(seeded))

    def restore(self) -> None:
        """Set the generators back."""
        for device, state in self.by_device:
            _module(device).set_rng_state(state, *_which(device))


def _module(device: torch.device) -> Any:
    return torch if device.type == "cpu" else torch.get_device_module(device)


@cache
def _has_state(device: torch.device) -> bool:
    """Whether torch knows the random state of a device; not of every backend (a lazy one has no module)."""
    try:
        return hasattr(_module(device), "get_rng_state")
    except RuntimeError:
        return False


def _state(device: torch.device) -> Tensor:
    state: Tensor = _module(device).get_rng_state(*_which(device))
    return state


def _is_same(one: Tensor, other: Tensor) -> bool:
    # Out of the sight of modes: states are nobody's data, and come from outside of all operators.
    with without_dispatch():
        return torch.equal(one, other)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type in ("cpu", "mps") else (device,)  # there is one, and its functions take no device


class RandomStates(NamedTuple):
    """The random states of torch, and of the global generators of Python and numpy (None where it is not loaded)."""

    torch: RandomState
    python: Any
    numpy: Any

    @classmethod
    def record(cls, tensors: Iterable[Tensor]) -> RandomStates:
        """The states now, of the devices of some tensors."""
        return cls(RandomState.record(tensors), *_host_states())

    def restore(self) -> None:
        """Set the generators back."""
        self.torch.restore()
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def moved_on_host(self) -> str | None:
        """The module whose global generator is in another state now, if one is."""
        python, numpy = _host_states()
        if python != self.python:
            return "random"
        if numpy is None:
            return None
        # A name, the words of the state as an array, the position in them, and a cached normal number.
        is_same = self.numpy is not None and numpy[2:] == self.numpy[2:] and (numpy[1] == self.numpy[1]).all()
        return None if is_same else "numpy.random"


def _host_states() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()
