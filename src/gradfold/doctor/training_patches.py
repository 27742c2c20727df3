"""The patches around training: backward passes, optimizers, clipping, loss scaling, schedules."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradfold.doctor.backward_passes import BackwardPasses
from gradfold.doctor.calls import Calls, learning_rate
from gradfold.doctor.guard import Look
from gradfold.doctor.loss_graph import mark
from gradfold.doctor.patches import Patches
from gradfold.doctor.steps import Steps
from gradfold.doctor.watch import Watch

__all__: list[str] = []


def patch_training(patches: Patches, watch: Watch) -> None:
    """Put them in place."""
    calls = Calls(watch)
    _backward(patches, watch)
    _optimizers(patches, watch)
    _clipping(patches, calls)
    _scaler(patches, calls)
    _schedulers(patches, calls)


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) or value is None else list(value)


def _backward(patches: Patches, watch: Watch) -> None:
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


def _optimizers(patches: Patches, watch: Watch) -> None:
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


def _zeroing(watch: Watch) -> Look:
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
