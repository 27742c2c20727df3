"""The patches around data and hosts: loaders, losses, ranks, autocast, reads by the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.data.dataloader as loaders
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradfold.doctor.calls import Calls
from gradfold.doctor.guard import Look
from gradfold.doctor.loss_graph import Term, mark
from gradfold.doctor.patches import Patches
from gradfold.doctor.place import Place
from gradfold.doctor.reading import depends_on_result
from gradfold.doctor.watch import Watch

__all__: list[str] = []

_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def patch_surroundings(patches: Patches, watch: Watch) -> None:
    """Put them in place."""
    calls = Calls(watch)
    _loaders(patches, watch)
    _losses(patches)
    _ranks(patches, calls)
    _reads(patches, watch, calls)
    _contexts(patches, watch)


def _loaders(patches: Patches, watch: Watch) -> None:
    numbers: dict[int, int] = {}

    def at_iter(self: Any) -> Look:
        number = watch.feeding.pass_begins(self)
        outcome = yield None
        if outcome.error is None:
            numbers[id(outcome.result)] = number

    def at_next(self: Any) -> Look | None:
        number = numbers.get(id(self))
        return None if number is None else fetching(number)

    def fetching(number: int) -> Look:
        start_s = time.perf_counter()
        outcome = yield None
        if outcome.error is None or isinstance(outcome.error, StopIteration):
            watch.feeding.fetched(number, outcome.result, time.perf_counter() - start_s)

    patches.look_at(loaders.DataLoader, "__iter__", at_iter)
    patches.look_at(loaders._BaseDataLoaderIter, "__next__", at_next)


def _losses(patches: Patches) -> None:
    """What the graph of cross_entropy does not show: smoothing and probabilities as targets."""

    def at_cross_entropy(input: Tensor, target: Tensor, *args: Any, **options: Any) -> Look:
        outcome = yield None
        loss = outcome.result
        reduction = options.get("reduction", args[4] if len(args) > 4 else "mean")
        smoothing = options.get("label_smoothing", args[5] if len(args) > 5 else 0.0)
        probabilities = isinstance(target, Tensor) and target.is_floating_point()
        has_graph = outcome.error is None and loss.grad_fn is not None
        if has_graph and (smoothing or probabilities) and reduction in ("mean", "sum"):
            ignored = options.get("ignore_index", args[2] if len(args) > 2 else -100)
            count = len(target) if probabilities else (target != ignored).sum()
            number = float(count) if isinstance(count, int) or count.device.type == "cpu" else count
            size = len(target) if probabilities else target.numel()
            mark(loss, Term("CrossEntropy", reduction, number, size, len(target), (), target))

    patches.look_at(nn.functional, "cross_entropy", at_cross_entropy)


def _ranks(patches: Patches, calls: Calls) -> None:
    def at_forward(self: nn.Module, *_args: Any, **_options: Any) -> None:
        calls.ddp_forward(self)

    patches.look_at(DistributedDataParallel, "forward", at_forward)


def _reads(patches: Patches, watch: Watch, calls: Calls) -> None:
    def look(name: str) -> Callable[..., Look | None]:
        def at_read(self: Tensor, *_args: Any, **_options: Any) -> Look | None:
            if watch.is_quiet or (watch.num_open_steps and not self.requires_grad):  # an optimizer reads its own state
                return None
            place = watch.map.caller()
            return None if place is None else reading(self, name, place)

        return at_read

    def reading(tensor: Tensor, name: str, place: Place) -> Look:
        with watch.quietly():
            start_s = time.perf_counter()
            outcome = yield None
            seconds = time.perf_counter() - start_s
            if outcome.error is None and (tensor.device.type != "cpu" or depends_on_result(tensor, place)):
                calls.read(place, name, tensor, seconds)

    for name in _READS:
        patches.look_at(Tensor, name, look(name))


def _contexts(patches: Patches, watch: Watch) -> None:
    def at_hooks(*_args: Any) -> None:
        watch.has_saved_hooks = True

    def at_autocast(self: Any) -> None:
        if getattr(self, "_enabled", False) and not watch.is_quiet:
            watch.precisions.add(str(getattr(self, "fast_dtype", "")).removeprefix("torch."))

    patches.look_at(torch.autograd.graph.saved_tensors_hooks, "__enter__", at_hooks)
    patches.look_at(torch.amp.autocast, "__enter__", at_autocast)
