"""A patch: a function of torch's, replaced while the script runs by one that tells the watch."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.utils.data.dataloader as loaders
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradfold.doctor.loss_graph import MARK, Term
from gradfold.doctor.place import Place
from gradfold.doctor.reading import depends_on_result
from gradfold.doctor.watch import Watch, _learning_rate

__all__: list[str] = []

_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


class Patches:
    """All patches of one watch; `undo` takes them back."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._undo: list[Callable[[], None]] = []

    def apply(self) -> None:
        """Put all patches in place."""
        for patch in (_backward, _optimizers, _clipping, _scaler, _schedulers, _loaders, _losses, _ranks, _reads):
            patch(self, self._watch)

    def undo(self) -> None:
        """Put torch's own functions back."""
        while self._undo:
            self._undo.pop()()

    def replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        """Put `wrap(original)` in the place of an attribute."""
        is_own = name in vars(owner)
        original = getattr(owner, name)
        replacement = functools.wraps(original)(wrap(original))
        setattr(owner, name, replacement)
        self._undo.append(lambda: setattr(owner, name, original) if is_own else delattr(owner, name))

    def on_undo(self, action: Callable[[], None]) -> None:
        """Do this when patches are taken back."""
        self._undo.append(action)


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) or value is None else list(value)


def _backward(patches: Patches, watch: Watch) -> None:
    def wrap_method(original: Any) -> Any:
        def backward(self: Tensor, gradient: Any = None, *args: Any, **options: Any) -> Any:
            if watch.is_quiet:
                return original(self, gradient, *args, **options)
            keeps = bool(options.get("retain_graph") or (args and args[0]))
            with watch.backward([self], [gradient], keeps):
                return original(self, gradient, *args, **options)

        return backward

    def wrap_function(original: Any) -> Any:
        def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **options: Any) -> Any:
            if watch.is_quiet:
                return original(tensors, grad_tensors, *args, **options)
            losses = _as_list(tensors)
            seeds = [None] * len(losses) if grad_tensors is None else _as_list(grad_tensors)
            with watch.backward(losses, seeds, bool(options.get("retain_graph") or (args and args[0]))):
                return original(tensors, grad_tensors, *args, **options)

        return backward

    patches.replace(Tensor, "backward", wrap_method)
    patches.replace(torch.autograd, "backward", wrap_function)


def _optimizers(patches: Patches, watch: Watch) -> None:
    before = register_optimizer_step_pre_hook(lambda optimizer, *_: watch.step_begins(optimizer))
    after = register_optimizer_step_post_hook(lambda optimizer, *_: watch.step_ends(optimizer))
    patches.on_undo(before.remove)
    patches.on_undo(after.remove)

    def wrap_init(original: Any) -> Any:
        def __init__(self: Optimizer, *args: Any, **options: Any) -> None:  # noqa: N807
            original(self, *args, **options)
            watch.add_optimizer(self)

        return __init__

    def wrap_zero(original: Any) -> Any:
        def zero_grad(self: Any, *args: Any, **options: Any) -> Any:
            with watch.zeroing():
                return original(self, *args, **options)

        return zero_grad

    patches.replace(Optimizer, "__init__", wrap_init)
    patches.replace(Optimizer, "zero_grad", wrap_zero)
    patches.replace(nn.Module, "zero_grad", wrap_zero)


def _clipping(patches: Patches, watch: Watch) -> None:
    def wrap(original: Any, kind: str) -> Any:
        def clip(parameters: Any, limit: float, *args: Any, **options: Any) -> Any:
            some = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            with watch.clipping(some, kind, float(limit)) as result:
                result["norm"] = original(some, limit, *args, **options)
            return result["norm"]

        def named(parameters: Any, *args: Any, **options: Any) -> Any:
            limit = args[0] if args else options.pop("max_norm" if kind == "norm" else "clip_value")
            return clip(parameters, limit, *args[1:], **options)

        return named

    for owner in (clip_grad, nn.utils):
        patches.replace(owner, "clip_grad_norm_", lambda original: wrap(original, "norm"))
        patches.replace(owner, "clip_grad_value_", lambda original: wrap(original, "value"))


def _scaler(patches: Patches, watch: Watch) -> None:
    def wrap_scale(original: Any) -> Any:
        def scale(self: Any, outputs: Any) -> Any:
            scaled = original(self, outputs)
            if self.is_enabled():
                for one in _as_list(scaled):
                    if isinstance(one, Tensor) and one.grad_fn is not None:
                        one.grad_fn.metadata[MARK] = "scaled"
            return scaled

        return scale

    def wrap(original: Any) -> Any:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            with watch.scaler_call(self, original.__name__, args[0] if args else options.get("optimizer")):
                return original(self, *args, **options)

        return call

    patches.replace(torch.amp.GradScaler, "scale", wrap_scale)
    for name in ("unscale_", "step", "update"):
        patches.replace(torch.amp.GradScaler, name, wrap)


def _schedulers(patches: Patches, watch: Watch) -> None:
    depth = [0]

    def wrap_step(original: Any) -> Any:
        def step(self: Any, *args: Any, **options: Any) -> Any:
            before = _learning_rate(getattr(self, "optimizer", None))
            depth[0] += 1
            try:
                result = original(self, *args, **options)
            finally:
                depth[0] -= 1
            if not depth[0]:
                watch.tick(self, watch.map.here(), before)
            return result

        step.gradfold_doctor = True  # type: ignore[attr-defined]
        return step

    def wrap_init(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807
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


def _wrap_steps(patches: Patches, kind: type, wrap: Callable[[Any], Any]) -> None:
    """Patch `step` of a class and of its bases, once: subclasses of the user's may have been made at any time."""
    for one in kind.__mro__:
        if "step" in vars(one) and not hasattr(vars(one)["step"], "gradfold_doctor"):
            patches.replace(one, "step", wrap)


def _loaders(patches: Patches, watch: Watch) -> None:
    numbers: dict[int, int] = {}

    def wrap_iter(original: Any) -> Any:
        def __iter__(self: Any) -> Iterator[Any]:  # noqa: N807
            number = watch.pass_begins(self)
            iterator: Iterator[Any] = original(self)
            numbers[id(iterator)] = number
            return iterator

        return __iter__

    def wrap_next(original: Any) -> Any:
        def __next__(self: Any) -> Any:  # noqa: N807
            start = time.perf_counter()
            number = numbers.get(id(self))
            try:
                batch = original(self)
            except StopIteration:
                if number is not None:
                    watch.fetched(number, None, time.perf_counter() - start)
                raise
            if number is not None:
                watch.fetched(number, batch, time.perf_counter() - start)
            return batch

        return __next__

    patches.replace(loaders.DataLoader, "__iter__", wrap_iter)
    patches.replace(loaders._BaseDataLoaderIter, "__next__", wrap_next)


def _losses(patches: Patches, watch: Watch) -> None:
    """What the graph of cross_entropy does not show: smoothing and probabilities as targets."""

    def wrap(original: Any) -> Any:
        def cross_entropy(input: Tensor, target: Tensor, *args: Any, **options: Any) -> Any:  # noqa: A002
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
                loss.grad_fn.metadata[MARK] = term
            return loss

        return cross_entropy

    patches.replace(nn.functional, "cross_entropy", wrap)


def _ranks(patches: Patches, watch: Watch) -> None:
    def wrap(original: Any) -> Any:
        def forward(self: nn.Module, *args: Any, **options: Any) -> Any:
            watch.ddp_forward(self)
            return original(self, *args, **options)

        return forward

    patches.replace(DistributedDataParallel, "forward", wrap)


def _reads(patches: Patches, watch: Watch) -> None:
    def wrap(original: Any) -> Any:
        name = original.__name__

        def read(self: Tensor, *args: Any, **options: Any) -> Any:
            if watch.is_quiet:
                return original(self, *args, **options)
            place: Place | None = watch.map.caller()
            if place is None:
                return original(self, *args, **options)
            watch.is_quiet += 1
            start = time.perf_counter()
            try:
                return original(self, *args, **options)
            finally:
                seconds = time.perf_counter() - start
                if self.device.type != "cpu" or depends_on_result(self, place):
                    watch.read(place, name, self, seconds, is_result=True)
                watch.is_quiet -= 1

        return read

    for name in _READS:
        patches.replace(Tensor, name, wrap)

    def wrap_enter(original: Any) -> Any:
        def __enter__(self: Any) -> Any:  # noqa: N807
            watch.has_saved_hooks = True
            return original(self)

        return __enter__

    def wrap_autocast(original: Any) -> Any:
        def __enter__(self: Any) -> Any:  # noqa: N807
            if getattr(self, "_enabled", False) and not watch.is_quiet:
                watch.precisions.add(str(getattr(self, "fast_dtype", "")).removeprefix("torch."))
            return original(self)

        return __enter__

    patches.replace(torch.autograd.graph.saved_tensors_hooks, "__enter__", wrap_enter)
    patches.replace(torch.amp.autocast, "__enter__", wrap_autocast)


