"""Live bytes: the memory of tensors that are alive, counted operator by operator, and its peak.

Counted is every storage that an operator has made since the count began, from then until it is freed, in forward and
backward passes, in the threads that carry torch's dispatch modes over as well. What was there before (parameters, the
batch) is not counted, nor what an operator needs for itself and frees before it returns.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts for the length of a `with` block.

    Attributes:
        now: bytes that are alive.
        peak: the most that were.
        elsewhere: bytes that were made under `not_counted`, in all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.elsewhere = 0
        self._known: dict[int, int] = {}  # address of a storage -> its bytes
        self._counts = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {_address(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and _address(one) not in before:
                self._add(one)
        return result

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """What is made meanwhile is in other memory."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def _add(self, tensor: Tensor) -> None:
        storage, address = tensor.untyped_storage(), _address(tensor)
        if not storage.nbytes() or address in self._known:
            return
        if not self._counts:
            self.elsewhere += storage.nbytes()
        size = storage.nbytes() if self._counts else 0
        self._known[address] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self._known.pop(address, 0)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
