"""The state of the process: what there is once for all threads, and what each forward pass finds as it has left it.

`torch.random.fork_rng`, `sdpa_kernel`, `warnings.catch_warnings` and the like change it at their beginning and back at
their end. In lock-step other forward passes run in between, which shall see nothing of it, and whose own ends would put
back what is not theirs. So it changes hands with the baton.

Each forward pass has random numbers of its own, since states that several pass on to each other cannot be forked: the
first goes on with those of the caller, the others begin at seeds that follow from them. Where one ends before the next
begins, they go on from each other as without lock-step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gradfold.state.rng import RandomState

__all__: list[str] = []

_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]


class GlobalState:
    """That of the caller, to which it comes back at the end of the `with` block.

    Args:
        tensors: on the devices whose random numbers count.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._one_per_device = list({tensor.device: tensor for tensor in tensors}.values())
        self._settings = _settings()
        self._owns: list[CoroutineState] = []

    def __enter__(self) -> GlobalState:
        self.begin = self.record_random()
        self.home = self.record()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.put_on(self.home)
        if error is None and self._owns:
            self._last_random().restore()
        self._owns.clear()

    def own(self) -> CoroutineState:
        """The state of one more forward pass."""
        self._owns.append(CoroutineState(self, len(self._owns), self._owns[-1] if self._owns else None))
        return self._owns[-1]

    def record(self) -> list[Any]:
        """The settings now."""
        return [read() for read, _ in self._settings]

    def put_on(self, wanted: list[Any]) -> None:
        """Change what is set otherwise."""
        for (read, write), value in zip(self._settings, wanted, strict=True):
            now = read()
            if now is not value and (isinstance(value, list) or now != value):
                write(value)

    def record_random(self) -> RandomState:
        """The states of the generators now."""
        return RandomState.record(self._one_per_device)

    def seeded(self, number: int) -> RandomState:
        """States that follow from those at the beginning, others for every number."""
        seed = self.begin.digest(number)
        states = [
            torch.Generator(device).manual_seed(seed).get_state()
            for device in (torch.device("cpu"), *(device for device, _ in self.begin.accelerators))
        ]
        devices = [device for device, _ in self.begin.accelerators]
        return RandomState(states[0], tuple(zip(devices, states[1:], strict=True)))

    def _last_random(self) -> RandomState:
        """Where the caller's own random numbers go on: nowhere that a forward pass has been."""
        in_turn = [own for own in self._owns if own.goes_on]
        last = in_turn[-1].random or self.begin
        if last.is_same(self.begin) and any(own.has_drawn() for own in self._owns):
            return self.seeded(len(self._owns))
        return last


class CoroutineState:
    """The state of one forward pass, on while it has the baton.

    Attributes:
        is_done: whether the forward pass is through.
        goes_on: whether its random numbers go on where the one before it has ended.
        random: the states of the generators when it has last handed the baton back.
    """

    def __init__(self, process: GlobalState, number: int, before: CoroutineState | None) -> None:
        self._process = process
        self._number = number
        self._before = before
        self._settings: list[Any] | None = None
        self._first: RandomState | None = None
        self.is_done = False
        self.goes_on = before is None
        self.random: RandomState | None = None

    def __enter__(self) -> CoroutineState:
        if self.random is None:
            self._begin()
        elif self.random.has_moved():
            self.random.restore()
        if self._settings is not None:
            self._process.put_on(self._settings)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.random = self._process.record_random()
        self._settings = self._process.record()
        self._process.put_on(self._process.home)

    def has_drawn(self) -> bool:
        """Whether it has left its generators in another state than it found them."""
        return self.random is not None and self._first is not None and not self.random.is_same(self._first)

    def _begin(self) -> None:
        if self._before is not None:
            self.goes_on = self._before.goes_on and self._before.is_done
            if not self.goes_on:
                self._process.seeded(self._number).restore()
        self._first = self._process.record_random()


def _settings() -> list[_Setting]:
    """How to read and write what blocks of torch and Python change for the whole process."""
    c: Any = torch._C
    found: list[_Setting] = [
        (torch.get_default_dtype, torch.set_default_dtype),
        (lambda: warnings.filters, _set_filters),
        (lambda: tuple(c._get_sdp_priority_order()), lambda order: c._set_sdp_priority_order(list(order))),
        (_determinism, lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1])),
        (
            lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
            lambda both: torch.set_anomaly_enabled(*both),
        ),
        (torch.is_warn_always_enabled, torch.set_warn_always),
    ]
    for kind in ("flash", "mem_efficient", "math", "cudnn", "overrideable"):
        found.append((getattr(c, f"_get_{kind}_sdp_enabled"), getattr(c, f"_set_sdp_use_{kind}")))
    for name in ("cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic", "mkldnn_enabled"):
        found.append((getattr(c, f"_get_{name}"), getattr(c, f"_set_{name}")))
    return found + [_attribute_of_warnings(name) for name in ("showwarning", "_showwarnmsg_impl")]


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _attribute_of_warnings(name: str) -> _Setting:
    return lambda: getattr(warnings, name), lambda value: setattr(warnings, name, value)


def _set_filters(filters: Any) -> None:
    warnings.filters = filters
    warnings._filters_mutated()  # type: ignore[attr-defined]
