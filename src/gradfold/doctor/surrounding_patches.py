"""The patches around data and hosts: loaders, losses, ranks, autocast, reads by the host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.data.dataloader as loaders
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradfold.doctor.calls import Calls
from gradfold.doctor.loss_graph import Term, mark
from gradfold.doctor.patches import Patches
from gradfold.doctor.reading import depends_on_result
from gradfold.doctor.watch import Watch

__all__: list[str] = []

_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def patch_surroundings(patches: Patches, watch: Watch, calls: Calls) -> None:
    """Put them in place."""
    _loaders(patches, watch)
    _losses(patches)
    _ranks(patches, calls)
    _reads(patches, watch, calls)
    _contexts(patches, watch)


def _loaders(patches: Patches, watch: Watch) -> None:
    numbers: dict[int, int] = {}

    def wrap_iter(original: Any) -> Any:
        def __iter__(self: Any) -> Iterator[Any]:
            number = watch.feeding.pass_begins(self)
            iterator: Iterator[Any] = original(self)
            numbers[id(iterator)] = number
            return iterator

        return __iter__

    def wrap_next(original: Any) -> Any:
        def __next__(self: Any) -> Any:
            start = time.perf_counter()
            number = numbers.get(id(self))
            try:
                batch = original(self)
            except StopIteration:
                if number is not None:
                    watch.feeding.fetched(number, None, time.perf_counter() - start)
                raise
            if number is not None:
                watch.feeding.fetched(number, batch, time.perf_counter() - start)
            return batch

        return __next__

    patches.replace(loaders.DataLoader, "__iter__", wrap_iter)
    patches.replace(loaders._BaseDataLoaderIter, "__next__", wrap_next)


def _losses(patches: Patches) -> None:
    """What the graph of cross_entropy does not show: smoothing and probabilities as targets."""

    def wrap(original: Any) -> Any:
        def cross_entropy(input: Tensor, target: Tensor, *args: Any, **options: Any) -> Any:
            loss = original(input, target, *args, **options)
            reduction = options.get("reduction", args[4] if len(args) > 4 else "mean")
            smoothing = options.get("label_smoothing", args[5] if len(args) > 5 else 0.0)
            probabilities = isinstance(target, Tensor) and target.is_floating_point()
            if (smoothing or probabilities) and reduction in ("mean", "sum") and loss.grad_fn is not None:
                ignored = options.get("ignore_index", args[2] if len(args) > 2 else -100)
                count = len(target) if probabilities else (target != ignored).sum()
                number = float(count) if isinstance(count, int) or count.device.type == "cpu" else count
                size = len(target) if probabilities else target.numel()
                term = Term("CrossEntropy", reduction, number, size, len(target), (), target)
                mark(loss, term)
            return loss

        return cross_entropy

    patches.replace(nn.functional, "cross_entropy", wrap)


def _ranks(patches: Patches, calls: Calls) -> None:
    def wrap(original: Any) -> Any:
        def forward(self: nn.Module, *args: Any, **options: Any) -> Any:
            calls.ddp_forward(self)
            return original(self, *args, **options)

        return forward

    patches.replace(DistributedDataParallel, "forward", wrap)


def _reads(patches: Patches, watch: Watch, calls: Calls) -> None:
    def wrap(original: Any) -> Any:
        name = original.__name__

        def read(self: Tensor, *args: Any, **options: Any) -> Any:
            if watch.is_quiet:
                return original(self, *args, **options)
            place = watch.map.caller()
            if place is None:
                return original(self, *args, **options)
            with watch.quietly():
                start = time.perf_counter()
                value = original(self, *args, **options)
                seconds = time.perf_counter() - start
                if self.device.type != "cpu" or depends_on_result(self, place):
                    calls.read(place, name, self, seconds)
            return value

        return read

    for name in _READS:
        patches.replace(Tensor, name, wrap)


def _contexts(patches: Patches, watch: Watch) -> None:
    def wrap_enter(original: Any) -> Any:
        def __enter__(self: Any) -> Any:
            watch.has_saved_hooks = True
            return original(self)

        return __enter__

    def wrap_autocast(original: Any) -> Any:
        def __enter__(self: Any) -> Any:
            if getattr(self, "_enabled", False) and not watch.is_quiet:
                watch.precisions.add(str(getattr(self, "fast_dtype", "")).removeprefix("torch."))
            return original(self)

        return __enter__

    patches.replace(torch.autograd.graph.saved_tensors_hooks, "__enter__", wrap_enter)
    patches.replace(torch.amp.autocast, "__enter__", wrap_autocast)
