"""A rehearsal: a program whose runs leave nothing behind, neither in what its functions reach nor in caches.

A fake tensor that stays in a list, a dict or a `functools.cache` fails when something real meets it, long after.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from gradfold.draws import OwnGenerators
from gradfold.memory.ledger import Ledger
from gradfold.memory.program import Program
from gradfold.surroundings import Surroundings

__all__: list[str] = []

_Wrapper: TypeAlias = "functools._lru_cache_wrapper[Any]"


def _caches() -> list[_Wrapper]:
    """The functions whose results are cached, but for torch's and our own, which keep no tensors of a model."""
    found = [one for one in gc.get_objects() if type(one) is functools._lru_cache_wrapper]
    return [one for one in found if str(getattr(one, "__module__", None)).split(".")[0] not in ("torch", "gradfold")]


@dataclass(frozen=True)
class Rehearsal(Program):
    """A `Program`; its runs put back what they change."""

    caches: list[_Wrapper] = field(default_factory=_caches, repr=False, compare=False)

    def run_fake(self, size: int, num_micro_batches: int) -> Ledger:
        """As of `Program`."""
        with self._without_trace():
            return super().run_fake(size, num_micro_batches)

    def run_real(self, size: int, num_micro_batches: int) -> Ledger:
        """As of `Program`."""
        with self._without_trace():
            return super().run_real(size, num_micro_batches)

    @contextmanager
    def _without_trace(self) -> Iterator[None]:
        misses = [one.cache_info().misses for one in self.caches]
        own = OwnGenerators()
        try:
            with Surroundings(self.model, self.loss_fn, self.specimen.collate), seen_by(own, self.model):
                yield
        finally:
            own.restore_generators()
            for cached, before in zip(self.caches, misses, strict=True):
                if cached.cache_info().misses != before:
                    cached.cache_clear()


def seen_by(own: OwnGenerators, model: nn.Module) -> AbstractContextManager[object]:
    """Has it see what a model runs; not so of a compiled one, which would be compiled again."""
    is_compiled = any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
    return nullcontext() if is_compiled else own
