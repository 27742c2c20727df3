"""The hooks on data: batches that loaders return, numbers that the host reads, dtypes of autocast regions."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gradfold.doctor.events import EpochStart, Fetch, LoaderState, Read
from gradfold.doctor.instrumentation import Hook, Patches
from gradfold.doctor.recorder import Recorder
from gradfold.doctor.source import NOWHERE, depends_on_result
from gradfold.doctor.torch_private import BaseDataLoaderIter

_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")
_DEPTH = 3  # to which a batch is searched for a tensor


class DataHooks:
    """Records epochs and fetches of every DataLoader, and what lines of the user's read of the model's results."""

    def __init__(self, recorder: Recorder, patches: Patches) -> None:
        self._recorder = recorder
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # of loaders
        self._epochs: Counter[int] = Counter()  # by loader's number
        self._loaders: dict[int, int] = {}  # by id of an iterator
        patches.hook(DataLoader, "__iter__", self._at_iter)
        patches.hook(BaseDataLoaderIter, "__next__", self._at_next)
        for call in _READS:
            patches.hook(Tensor, call, partial(self._at_read, call))
        patches.hook(torch.amp.autocast, "__enter__", self._at_autocast)

    def _at_iter(self, loader: Any) -> Hook:
        recorder = self._recorder
        number = self._numbers.setdefault(loader, len(self._numbers))
        self._epochs[number] += 1
        if recorder.loader_state.loader == number:
            recorder.loader_state = replace(recorder.loader_state, epoch=self._epochs[number])
        try:
            length: int | None = len(loader)
        except (TypeError, NotImplementedError):
            length = None
        recorder.log.add(EpochStart, recorder.source.here(), number, length)
        outcome = yield None
        if outcome.error is None:
            self._loaders[id(outcome.result)] = number

    def _at_next(self, iterator: Any) -> Hook:
        recorder, loader = self._recorder, self._loaders.get(id(iterator))
        if loader is None:
            return
        start_s = time.perf_counter()
        outcome = yield None
        seconds = time.perf_counter() - start_s
        if outcome.error is None:
            num_fetched = recorder.loader_state.num_fetched + 1
            recorder.loader_state = LoaderState(loader, self._epochs[loader], _rows(outcome.result), num_fetched)
        is_end = isinstance(outcome.error, StopIteration)
        if is_end or outcome.error is None:
            recorder.log.add(Fetch, NOWHERE, loader, is_end, seconds)

    def _at_read(self, call: str, tensor: Tensor, /, *_args: Any, **_options: Any) -> Hook:
        recorder, log = self._recorder, self._recorder.log
        if recorder.is_paused or (recorder.open_steps and not tensor.requires_grad):
            return  # an optimizer reads its own state
        location = recorder.source.here()
        if not location.file or location.through:
            return  # a library reads
        with recorder.paused():
            start_s = time.perf_counter()
            outcome = yield None
            seconds = time.perf_counter() - start_s
            if outcome.error is None and (tensor.device.type != "cpu" or depends_on_result(tensor, location)):
                log.add(Read, location, call, seconds, len(log.backwards), tensor.device.type)

    def _at_autocast(self, region: Any) -> Hook:
        if getattr(region, "_enabled", False) and not self._recorder.is_paused:
            self._recorder.autocast_dtypes.add(str(getattr(region, "fast_dtype", "")).removeprefix("torch."))
        yield None


def _rows(batch: Any, depth: int = 0) -> int:
    """Of the first tensor in a batch of any nesting."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 0
    if depth > _DEPTH:
        return 0
    values = batch.values() if hasattr(batch, "values") else batch if isinstance(batch, (list, tuple)) else ()
    return next((rows for value in list(values)[:8] if (rows := _rows(value, depth + 1))), 0)
