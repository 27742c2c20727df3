"""The buffers that forward passes change: found once, kept during each window, restored when it fails.

BatchNorm's running statistics do not bump their version counters, and `self.ema = ...` rebinds a buffer without one.
So the first window keeps and compares every buffer; later ones only those that had changed, all running statistics in
training mode, and those whose version counter has moved since. A changed `training` flag starts over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter
from typing import Any

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
class _Buffer:
    """A place for a buffer, and what stood there when the window opened.

    Attributes:
        tensor: None where there was none yet, or that of a lazy module that has not run.
        copy: of its values; None where no change is expected.
    """

    module: nn.Module
    name: str
    tensor: Tensor | None = None
    version: int = 0
    copy: Tensor | None = None

    @property
    def key(self) -> tuple[int, str]:
        return id(self.module), self.name

    @property
    def now(self) -> Any:
        return getattr(self.module, self.name, None)  # a scripted module's `_buffers` has no `get`

    def shows_change(self) -> bool:
        """Whether it was made, rebound, or written to by what moves the version counter."""
        if self.tensor is None:
            return self.now is not None and not is_lazy(self.now)
        is_resized = self.copy is not None and self.tensor.shape != self.copy.shape
        return self.tensor is not self.now or self.tensor._version != self.version or is_resized

    def put_back(self) -> bool:
        """Undo a change; False where there is no copy."""
        if self.tensor is None:
            if isinstance(self.module, NormBase):
                self.module.reset_running_stats()  # a lazy layer that has run cannot be made lazy again
            else:
                self.module._buffers[self.name] = None
            return True
        if self.copy is None:
            return False
        if self.tensor is not self.now:
            self.module._buffers[self.name] = self.tensor
        if self.tensor.shape != self.copy.shape:  # an observer's, which its first forward pass sizes
            self.tensor.resize_(self.copy.shape)
        if not is_expanded(self.tensor):
            self.tensor.copy_(self.copy)
        return True


class BufferKeeper:
    """Keeps what may change in a model's buffers, from the opening of a window to its close."""

    def __init__(self) -> None:
        self._modes: list[tuple[int, bool]] | None = None
        self._changing: set[tuple[int, str]] | None = None  # None: not known yet
        self._found: list[_Buffer] = []

    def open(self, modules: Sequence[nn.Module]) -> None:
        """Copy the buffers of these modules that may change."""
        modes = [(id(module), module.training) for module in modules]
        if modes != self._modes:
            self._modes, self._changing = modes, None
        self._found = list(self._find(modules))

    def learn(self) -> None:
        """Note what this window has changed; the copies stay."""
        if not self._found:
            return
        if self._changing is None:
            self._changing = {one.key for one in self.changes()}
        else:  # one that this window made (a codebook, a moving average) will go on changing
            self._changing |= {one.key for one in self._found if one.copy is None and one.shows_change()}

    def close(self) -> None:
        """Drop the copies."""
        self._found = []

    def changes(self) -> list[_Buffer]:
        """The buffers that differ from what they were when the window opened."""
        changes: list[_Buffer] = []
        unclear: dict[torch.device, list[tuple[_Buffer, Tensor]]] = {}  # by device, to read each in one transfer
        for one in self._found:
            if one.shows_change():
                changes.append(one)
            # Sparse tensors cannot be compared, but nothing changes them behind their version counters.
            elif one.tensor is not None and one.copy is not None and one.copy.layout is torch.strided:
                unclear.setdefault(one.copy.device, []).append((one, (one.tensor != one.copy).any()))
        for compared in unclear.values():
            buffers, flags = zip(*compared, strict=True)
            changes += compress(buffers, torch.stack(flags).tolist())
        return changes

    def changed(self, model: nn.Module) -> list[str]:
        """The names of the buffers that differ from what they were when the window opened."""
        paths = {id(module): f"{path}." if path else "" for path, module in model.named_modules()}
        return [paths[id(one.module)] + one.name for one in self.changes()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the values of the buffers when the window opened, in the same tensors."""
        try:
            changes = self.changes()  # what is unchanged is not written to: that would move its version counter
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            changes = [one for one in self._found if one.copy is not None or one.shows_change()]
        lost = [f"{type(one.module).__name__}.{one.name}" for one in changes if not one.put_back()]
        self._changing = None
        self._found = []
        if lost:
            warn(
                f"a failed window changed buffers that no window had changed before: {', '.join(lost)}. They keep "
                "their new values; everything else was restored.",
            )

    def _find(self, modules: Sequence[nn.Module]) -> Iterator[_Buffer]:
        copies: dict[int, Tensor] = {}  # by tensor, which may stand in several places
        for module in modules:
            for name, tensor in module._buffers.items():
                if tensor is None or is_lazy(tensor):
                    yield _Buffer(module, name)
                elif not tensor.is_inference():
                    is_known = self._changing is None or (id(module), name) in self._changing
                    may_change = is_known or (isinstance(module, NormBase) and module.training)
                    if may_change and id(tensor) not in copies:
                        copies[id(tensor)] = tensor.detach().clone()
                    yield _Buffer(module, name, tensor, tensor._version, copies.get(id(tensor)))


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
            kept = [one for one in known if copies_all or id(one) in self._moving]
            self._copies = {id(one): one.detach().clone() for one in kept}

    def learn(self) -> None:
        """Note which have moved."""
        self._moving |= {id(one) for one, _ in self.moved()}

    def moved(self) -> list[tuple[nn.Parameter, int]]:
        """The parameters that have moved since the opening, each with its version then."""
        now = list(map(_VERSION, self._frozen))
        if now == self._versions:
            return []
        versions = zip(self._frozen, self._versions, now, strict=True)
        return [(one, before) for one, before, after in versions if before != after]

    def close(self) -> None:
        """Let the copies go."""
        self._frozen, self._versions, self._copies = [], [], {}

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was copied; warn of the rest."""
        lost = []
        for parameter, version in self.moved():
            self._moving.add(id(parameter))
            if id(parameter) not in self._copies:
                lost.append(tuple(parameter.shape))
                continue
            parameter.copy_(self._copies[id(parameter)])
            set_versions((parameter,), (version,))  # the window around a probe shall not find that it has moved
        self._versions = list(map(_VERSION, self._frozen))
        if lost:
            warn(
                f"loss_fn moved frozen parameters of which no copy was kept, of shapes {lost}, in a window that failed "
                "or in a check. They keep their new values; everything else was restored."
            )


def _num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(one.nbytes for one in parameters if not is_lazy(one))
