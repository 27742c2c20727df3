"""The patches around training: backward passes, optimizers, clipping, loss scaling, schedules."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradfold.doctor.calls import Calls, learning_rate
from gradfold.doctor.loss_graph import mark
from gradfold.doctor.patches import Patches
from gradfold.doctor.watch import Watch

__all__: list[str] = []


def patch_training(patches: Patches, watch: Watch, calls: Calls) -> None:
    """Put them in place."""
    _backward(patches, watch)
    _optimizers(patches, watch)
    _clipping(patches, calls)
    _scaler(patches, calls)
    _schedulers(patches, calls)


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) or value is None else list(value)


def _backward(patches: Patches, watch: Watch) -> None:
    def wrap_method(original: Any) -> Any:
        def backward(self: Tensor, gradient: Any = None, *args: Any, **options: Any) -> Any:
            with _watching(watch, self, gradient, args, options):
                return original(self, gradient, *args, **options)

        return backward

    def wrap_function(original: Any) -> Any:
        def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **options: Any) -> Any:
            with _watching(watch, tensors, grad_tensors, args, options):
                return original(tensors, grad_tensors, *args, **options)

        return backward

    patches.replace(Tensor, "backward", wrap_method)
    patches.replace(torch.autograd, "backward", wrap_function)
    for name, module in list(sys.modules.items()):  # gradfold calls torch's engine itself
        if name.startswith("gradfold.") and "_engine_run_backward" in vars(module):
            patches.replace(module, "_engine_run_backward", wrap_function)


def _watching(
    watch: Watch, tensors: Any, seeds: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> AbstractContextManager[None]:
    if watch.is_quiet:
        return nullcontext()
    losses = _as_list(tensors)
    given = [None] * len(losses) if seeds is None else _as_list(seeds)
    return watch.backward(losses, given, keeps_graph=bool(options.get("retain_graph") or (args and args[0])))


def _optimizers(patches: Patches, watch: Watch) -> None:
    before = register_optimizer_step_pre_hook(lambda optimizer, *_: watch.step_begins(optimizer))
    after = register_optimizer_step_post_hook(lambda optimizer, *_: watch.step_ends(optimizer))
    patches.on_undo(before.remove)
    patches.on_undo(after.remove)

    def wrap_init(original: Any) -> Any:
        def __init__(self: Optimizer, *args: Any, **options: Any) -> None:
            original(self, *args, **options)
            watch.ledger_of(self)

        return __init__

    def wrap_zero(original: Any) -> Any:
        def zero_grad(self: Any, *args: Any, **options: Any) -> Any:
            with watch.zeroing():
                return original(self, *args, **options)

        return zero_grad

    patches.replace(Optimizer, "__init__", wrap_init)
    patches.replace(Optimizer, "zero_grad", wrap_zero)
    patches.replace(nn.Module, "zero_grad", wrap_zero)


def _clipping(patches: Patches, calls: Calls) -> None:
    def wrap(original: Any, kind: str) -> Any:
        def clip(parameters: Any, limit: float, *args: Any, **options: Any) -> Any:
            some = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            with calls.clipping(some, kind, float(limit)) as result:
                result["norm"] = original(some, limit, *args, **options)
            return result["norm"]

        def named(parameters: Any, *args: Any, **options: Any) -> Any:
            limit = args[0] if args else options.pop("max_norm" if kind == "norm" else "clip_value")
            return clip(parameters, limit, *args[1:], **options)

        return named

    for owner in (clip_grad, nn.utils):
        patches.replace(owner, "clip_grad_norm_", lambda original: wrap(original, "norm"))
        patches.replace(owner, "clip_grad_value_", lambda original: wrap(original, "value"))


def _scaler(patches: Patches, calls: Calls) -> None:
    def wrap_scale(original: Any) -> Any:
        def scale(self: Any, outputs: Any) -> Any:
            scaled = original(self, outputs)
            if self.is_enabled():
                for one in _as_list(scaled):
                    mark(one, "scaled")
            return scaled

        return scale

    def wrap(original: Any) -> Any:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            with calls.scaler(self, original.__name__, args[0] if args else options.get("optimizer")):
                return original(self, *args, **options)

        return call

    patches.replace(torch.amp.GradScaler, "scale", wrap_scale)
    for name in ("unscale_", "step", "update"):
        patches.replace(torch.amp.GradScaler, name, wrap)


def _schedulers(patches: Patches, calls: Calls) -> None:
    depth = [0]

    def wrap_step(original: Any) -> Any:
        def step(self: Any, *args: Any, **options: Any) -> Any:
            before = learning_rate(getattr(self, "optimizer", None))
            depth[0] += 1
            try:
                result = original(self, *args, **options)
            finally:
                depth[0] -= 1
            if not depth[0]:
                calls.tick(self, before)
            return result

        step.gradfold_doctor = True  # type: ignore[attr-defined]
        return step

    def wrap_init(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **options: Any) -> None:
            _wrap_steps(patches, type(self), wrap_step)
            depth[0] += 1  # the step that construction makes is no tick
            try:
                original(self, *args, **options)
            finally:
                depth[0] -= 1

        return __init__

    kinds = [one for one in vars(lr_scheduler).values() if isinstance(one, type)]
    for kind in kinds:
        if issubclass(kind, lr_scheduler.LRScheduler) and "__init__" in vars(kind):
            patches.replace(kind, "__init__", wrap_init)


def _wrap_steps(patches: Patches, kind: type, wrap: Any) -> None:
    """Patch `step` of a class and of its bases, once: subclasses of the user's may have been made at any time."""
    for one in kind.__mro__:
        if "step" in vars(one) and not hasattr(vars(one)["step"], "gradfold_doctor"):
            patches.replace(one, "step", wrap)
