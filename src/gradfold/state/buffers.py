"""The buffers that forward passes change: found once, kept during each window, restored when it fails.

BatchNorm's running statistics do not bump their version counters, and `self.ema = ...` rebinds a buffer without one.
So the first window keeps every buffer and compares by value and identity when it closes; later windows keep only those
that had changed, all running statistics in training mode, and those whose version counter has moved since. A changed
`training` flag starts over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gradfold.errors import is_out_of_memory
from gradfold.messages import warn
from gradfold.state.attributes import is_expanded
from gradfold.torch_private import NormBase, set_versions

_VERSION = attrgetter("_version")
_MAX_FROZEN_BYTES = 2**26  # of all frozen parameters, to copy before one is known to move


@dataclass(frozen=True, slots=True)
class _BufferLocation:
    """A buffer's place in the model and the tensor that stood there when the window opened."""

    module: nn.Module
    name: str
    tensor: Tensor
    version: int

    @property
    def key(self) -> tuple[int, str]:
        return id(self.module), self.name

    def is_rebound(self) -> bool:
        return getattr(self.module, self.name, None) is not self.tensor  # a scripted module's `_buffers` has no `get`


class BufferKeeper:
    """Keeps what may change in a model's buffers, from the opening of a window to its close."""

    def __init__(self) -> None:
        self._modes: list[tuple[int, bool]] | None = None
        self._changing: set[tuple[int, str]] | None = None  # None: not known yet
        self._kept: list[tuple[_BufferLocation, Tensor]] = []
        self._unkept: list[_BufferLocation] = []
        self._missing: list[tuple[nn.Module, str]] = []  # None, or of a lazy module that has not run

    def open(self, modules: Sequence[nn.Module]) -> None:
        """Copy the buffers of these modules that may change."""
        places = _places(modules)
        self._missing = _missing(modules)
        modes = [(id(module), module.training) for module in modules]
        if modes != self._modes:
            self._modes, self._changing = modes, None
        keep = [place for place in places if self._may_change(place)]
        self._kept = [(place, copy) for place, copy in zip(keep, _copies(keep), strict=True)]
        self._unkept = [place for place in places if not self._may_change(place)]

    def learn(self) -> None:
        """Note what this window has changed; the copies stay."""
        if not self._kept and not self._unkept and not self._missing:
            return
        if self._changing is None:
            self._changing = _changed(self._kept)
        self._changing |= {place.key for place in self._unkept if _shows_change(place)}
        # A buffer that this window made (a codebook, a moving average) will go on changing.
        self._changing |= {
            (id(module), name) for module, name in self._missing if module._buffers.get(name) is not None
        }

    def close(self) -> None:
        """Drop the copies."""
        self._kept, self._unkept, self._missing = [], [], []

    def have_changed(self) -> bool:
        """Whether some buffer differs from what it was when the window opened."""
        return bool(
            _changed(self._kept)
            or any(map(_shows_change, self._unkept))
            or any(module._buffers.get(name) is not None for module, name in self._missing)
        )

    def changed(self, model: nn.Module) -> list[str]:
        """The names of the buffers that differ from what they were when the window opened."""
        changed = _changed(self._kept)
        return [
            f"{path}.{name}" if path else name
            for path, module in model.named_modules()
            for name in module._buffers
            if (id(module), name) in changed
        ]

    def restore(self) -> None:
        """Put back the values of the buffers when the window opened, in the same tensors."""
        changed = _changed_if_known(self._kept)
        with torch.no_grad():
            for place, copy in self._kept:
                # What is unchanged is not written to: that would move its version counter.
                if place.key in changed:
                    if place.is_rebound():
                        place.module._buffers[place.name] = place.tensor
                    if not is_expanded(place.tensor):
                        place.tensor.copy_(copy)
        for module, name in self._missing:
            _take_away(module, name)
        lost = [f"{type(place.module).__name__}.{place.name}" for place in self._unkept if _shows_change(place)]
        self._changing = None
        self._kept, self._unkept, self._missing = [], [], []
        if lost:
            warn(
                f"a failed window changed buffers that no window had changed before: {', '.join(lost)}. They keep "
                "their new values; everything else was restored.",
            )

    def _may_change(self, place: _BufferLocation) -> bool:
        if self._changing is None or place.key in self._changing:
            return True
        return isinstance(place.module, NormBase) and place.module.training


class FrozenKeeper:
    """Keeps frozen parameters that `loss_fn` moves (a teacher that follows by a moving average).

    Their version counters show it. They may be large, so one is copied once it has been seen to move.

    Args:
        copies_all: copy all, for runs before which none has been seen to move; but not where they are many and larger
            than what is trained. A teacher is as large as its student. A frozen backbone does not move, and a copy of
            it may not fit.
    """

    def __init__(self, copies_all: bool = False) -> None:
        self._copies_all = copies_all
        self._moving: set[int] = set()
        self._frozen: list[nn.Parameter] = []
        self._versions: list[int] = []
        self._copies: dict[int, Tensor] = {}

    def open(self, parameters: Sequence[nn.Parameter]) -> None:
        """Note the versions of the frozen ones of these parameters, and copy those that may move."""
        self._frozen = [one for one in parameters if not one.requires_grad and not one.is_inference()]
        self._versions = list(map(_VERSION, self._frozen))
        self._copies.clear()
        if self._moving or self._copies_all:
            known = [one for one in self._frozen if not is_lazy(one)]
            trained = (one for one in parameters if one.requires_grad)
            copies_all = self._copies_all and _num_bytes(known) <= max(_MAX_FROZEN_BYTES, _num_bytes(trained))
            for parameter in known:
                if copies_all or id(parameter) in self._moving:
                    self._copies[id(parameter)] = parameter.detach().clone()

    def learn(self) -> None:
        """Note which have moved."""
        self._moving |= set(map(id, self.moved()))

    def moved(self) -> list[nn.Parameter]:
        """The parameters that have moved since the opening."""
        now = list(map(_VERSION, self._frozen))
        if now == self._versions:
            return []
        return [one for one, before, after in zip(self._frozen, self._versions, now, strict=True) if before != after]

    def close(self) -> None:
        """Let the copies go."""
        self._frozen, self._versions, self._copies = [], [], {}

    def restore(self) -> None:
        """Put back what was copied; warn of the rest."""
        moved = self.moved()
        self._moving |= set(map(id, moved))
        lost = [tuple(parameter.shape) for parameter in moved if id(parameter) not in self._copies]
        with torch.no_grad():
            for parameter, version in zip(self._frozen, self._versions, strict=True):
                if parameter._version != version and id(parameter) in self._copies:
                    parameter.copy_(self._copies[id(parameter)])
                    # The window around a probe shall not find that something has moved.
                    set_versions((parameter,), (version,))
        self._versions = list(map(_VERSION, self._frozen))
        if lost:
            warn(
                f"loss_fn moved frozen parameters of which no copy was kept, of shapes {lost}, in a window that failed "
                "or in a check. They keep their new values; everything else was restored."
            )


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(one.nbytes for one in parameters if not is_lazy(one))


def _places(modules: Iterable[nn.Module]) -> list[_BufferLocation]:
    return [
        _BufferLocation(module, name, tensor, tensor._version)
        for module in modules
        for name, tensor in module._buffers.items()
        if tensor is not None and not is_lazy(tensor) and not tensor.is_inference()
    ]


def _missing(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    return [
        (module, name)
        for module in modules
        for name, tensor in module._buffers.items()
        if tensor is None or is_lazy(tensor)
    ]


def _take_away(module: nn.Module, name: str) -> None:
    """Undo what gave a value to a buffer that had none."""
    tensor = module._buffers.get(name)
    if tensor is None or is_lazy(tensor):
        return
    if isinstance(module, NormBase):
        module.reset_running_stats()  # a lazy layer that has run cannot be made lazy again
    else:
        module._buffers[name] = None


def _copies(places: list[_BufferLocation]) -> list[Tensor]:
    """A copy per place; a tensor that stands in several places is copied once."""
    copies = {id(place.tensor): place.tensor for place in places}
    with torch.no_grad():
        copies = {key: tensor.detach().clone() for key, tensor in copies.items()}
    return [copies[id(place.tensor)] for place in places]


def _shows_change(place: _BufferLocation) -> bool:
    return place.is_rebound() or place.tensor._version != place.version


def _changed(kept: list[tuple[_BufferLocation, Tensor]]) -> set[tuple[int, str]]:
    """The places that differ from their copies; values are compared on the device and read in one transfer each."""
    changed = {place.key for place, _ in kept if _shows_change(place)}
    # Sparse tensors cannot be compared, but nothing changes them behind their version counters.
    unclear = [(place, copy) for place, copy in kept if place.key not in changed and copy.layout is torch.strided]
    differs: dict[torch.device, list[Tensor]] = {}
    order: dict[torch.device, list[_BufferLocation]] = {}
    for place, copy in unclear:
        differs.setdefault(copy.device, []).append((place.tensor != copy).any())
        order.setdefault(copy.device, []).append(place)
    for device, flags in differs.items():
        for place, flag in zip(order[device], torch.stack(flags).tolist(), strict=True):
            if flag:
                changed.add(place.key)
    return changed


def _changed_if_known(kept: list[tuple[_BufferLocation, Tensor]]) -> set[tuple[int, str]]:
    """The places that differ from their copies; all of them where memory does not suffice to compare."""
    try:
        return _changed(kept)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {place.key for place, _ in kept}
