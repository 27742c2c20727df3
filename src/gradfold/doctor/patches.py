"""The patches around training: backward passes, optimizers, clipping, loss scaling, schedules.

The patches around data and hosts: loaders, losses, ranks, autocast, reads by the host.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from types import GeneratorType
from typing import Any

import torch
import torch.utils.data.dataloader as loaders
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradfold.doctor.instrumentation import Look, Patches
from gradfold.doctor.loss_graph import DividedTerm, mark
from gradfold.doctor.observers import BackwardPasses, Calls, Steps, learning_rate
from gradfold.doctor.recorder import Recorder
from gradfold.doctor.source import SourceLocation, depends_on_result

__all__: list[str] = []

_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def patch_surroundings(patches: Patches, watch: Recorder) -> None:
    """Put them in place."""
    calls = Calls(watch)
    _loaders(patches, watch)
    _losses(patches)
    _ranks(patches, calls)
    _reads(patches, watch, calls)
    _contexts(patches, watch)


def _loaders(patches: Patches, watch: Recorder) -> None:
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
            mark(loss, DividedTerm("CrossEntropy", reduction, number, size, len(target), (), target))

    patches.look_at(nn.functional, "cross_entropy", at_cross_entropy)


def _ranks(patches: Patches, calls: Calls) -> None:
    def at_forward(self: nn.Module, *_args: Any, **_options: Any) -> None:
        calls.ddp_forward(self)

    patches.look_at(DistributedDataParallel, "forward", at_forward)


def _reads(patches: Patches, watch: Recorder, calls: Calls) -> None:
    def look(name: str) -> Callable[..., Look | None]:
        def at_read(self: Tensor, *_args: Any, **_options: Any) -> Look | None:
            if watch.is_quiet or (watch.num_open_steps and not self.requires_grad):  # an optimizer reads its own state
                return None
            place = watch.map.caller()
            return None if place is None else reading(self, name, place)

        return at_read

    def reading(tensor: Tensor, name: str, place: SourceLocation) -> Look:
        with watch.quietly():
            start_s = time.perf_counter()
            outcome = yield None
            seconds = time.perf_counter() - start_s
            if outcome.error is None and (tensor.device.type != "cpu" or depends_on_result(tensor, place)):
                calls.read(place, name, tensor, seconds)

    for name in _READS:
        patches.look_at(Tensor, name, look(name))


def _contexts(patches: Patches, watch: Recorder) -> None:
    def at_hooks(*_args: Any) -> None:
        watch.has_saved_hooks = True

    def at_autocast(self: Any) -> None:
        if getattr(self, "_enabled", False) and not watch.is_quiet:
            watch.precisions.add(str(getattr(self, "fast_dtype", "")).removeprefix("torch."))

    patches.look_at(torch.autograd.graph.saved_tensors_hooks, "__enter__", at_hooks)
    patches.look_at(torch.amp.autocast, "__enter__", at_autocast)


def patch_training(patches: Patches, watch: Recorder) -> None:
    """Put them in place."""
    calls = Calls(watch)
    _backward(patches, watch)
    _optimizers(patches, watch)
    _clipping(patches, calls)
    _scaler(patches, calls)
    _schedulers(patches, calls)


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) or value is None else list(value)


def _backward(patches: Patches, watch: Recorder) -> None:
    passes = BackwardPasses(watch)

    def look(tensors: Any, seeds: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Look | None:
        if watch.is_quiet:
            return None
        losses = _as_list(tensors)
        given = [None] * len(losses) if seeds is None else _as_list(seeds)
        return passes.look(losses, given, keeps_graph=bool(options.get("retain_graph") or (args and args[0])))

    def at_method(self: Tensor, gradient: Any = None, *args: Any, **options: Any) -> Look | None:
        return look(self, gradient, args, options)

    def at_function(tensors: Any, grad_tensors: Any = None, *args: Any, **options: Any) -> Look | None:
        return look(tensors, grad_tensors, args, options)

    patches.look_at(Tensor, "backward", at_method)
    patches.look_at(torch.autograd, "backward", at_function)
    for name, module in list(sys.modules.items()):  # gradfold calls torch's engine itself
        if name.startswith("gradfold.") and "_engine_run_backward" in vars(module):
            patches.look_at(module, "_engine_run_backward", at_function)


def _optimizers(patches: Patches, watch: Recorder) -> None:
    guard, steps = patches.guard, Steps(watch)
    hooks = (
        register_optimizer_step_pre_hook(partial(guard.attempt, "step", steps.begin)),
        register_optimizer_step_post_hook(partial(guard.attempt, "step", steps.end)),
    )
    for hook in hooks:
        patches.on_undo(hook.remove)

    def at_init(self: Optimizer, *_args: Any, **_options: Any) -> Look:
        outcome = yield None
        if outcome.error is None:
            watch.ledger_of(self)

    def at_zero(*_args: Any, **_options: Any) -> Look | None:
        return None if watch.is_quiet else _zeroing(watch)

    patches.look_at(Optimizer, "__init__", at_init)
    patches.look_at(Optimizer, "zero_grad", at_zero)
    patches.look_at(nn.Module, "zero_grad", at_zero)


def _zeroing(watch: Recorder) -> Look:
    with watch.quietly():
        watch.settle()
        yield None
        watch.settle(watch.map.here())


def _clipping(patches: Patches, calls: Calls) -> None:
    def look(kind: str, name: str) -> Callable[..., Look]:
        def at_clip(*args: Any, **options: Any) -> Look:
            parameters = args[0] if args else options["parameters"]
            seen, parameters = _twice(parameters)
            limit = args[1] if len(args) > 1 else options[name]
            instead = ((parameters, *args[1:]), options) if args else ((), {**options, "parameters": parameters})
            return calls.clipping(seen, kind, float(limit), instead)

        return at_clip

    for owner in (clip_grad, nn.utils):
        patches.look_at(owner, "clip_grad_norm_", look("norm", "max_norm"))
        patches.look_at(owner, "clip_grad_value_", look("value", "clip_value"))


def _twice(parameters: Any) -> tuple[Iterable[Tensor], Any]:
    """Parameters to look at once the call has ended, and those for the call: what can be read only once is copied."""
    if isinstance(parameters, Tensor):
        return [parameters], parameters
    if not isinstance(parameters, Iterator):
        return (list(parameters) if isinstance(parameters, Collection) else []), parameters
    for_us, for_torch = itertools.tee(parameters)
    if isinstance(parameters, GeneratorType):  # torch asks for that type
        return for_us, (one for one in for_torch)
    return for_us, for_torch


def _scaler(patches: Patches, calls: Calls) -> None:
    def at_scale(self: Any, *_args: Any, **_options: Any) -> Look:
        outcome = yield None
        if outcome.error is None and self.is_enabled():
            for one in _as_list(outcome.result):
                mark(one, "scaled")

    def look(name: str) -> Callable[..., Look | None]:
        def at_call(self: Any, *args: Any, **options: Any) -> Look | None:
            return calls.scaler(self, name, args[0] if args else options.get("optimizer"))

        return at_call

    patches.look_at(torch.amp.GradScaler, "scale", at_scale)
    for name in ("unscale_", "step", "update"):
        patches.look_at(torch.amp.GradScaler, name, look(name))


def _schedulers(patches: Patches, calls: Calls) -> None:
    depth = 0

    def at_step(self: Any, *_args: Any, **_options: Any) -> Look:
        nonlocal depth
        before = learning_rate(getattr(self, "optimizer", None))
        depth += 1
        outcome = yield None
        depth -= 1
        if not depth and outcome.error is None:
            calls.tick(self, before)

    def at_init(self: Any, *_args: Any, **_options: Any) -> Look:
        nonlocal depth
        _patch_steps(patches, type(self), at_step)
        depth += 1  # the step that construction makes is no tick
        yield None
        depth -= 1

    kinds = [one for one in vars(lr_scheduler).values() if isinstance(one, type)]
    for kind in kinds:
        if issubclass(kind, lr_scheduler.LRScheduler) and "__init__" in vars(kind):
            patches.look_at(kind, "__init__", at_init)


def _patch_steps(patches: Patches, kind: type, look: Callable[..., Look]) -> None:
    """Patch `step` of a class and of its bases, once: subclasses of the user's may have been made at any time."""
    for one in kind.__mro__:
        if "step" in vars(one) and not hasattr(vars(one)["step"], "gradfold_doctor"):
            patches.look_at(one, "step", look)
