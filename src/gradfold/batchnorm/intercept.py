"""An attendance: which BatchNorm layers run in a window, under which names, and whether each was met.

Counters of batches: `num_batches_tracked`, which counts a batch once however many micro-batches it has.

In layers of torch's own an `BatchNormMode` lets the first micro-batch count alone. A layer whose forward is the user's
may count in any way (`self.num_batches_tracked = self.num_batches_tracked + 1`), so what stands there is put back.

An interception: function modes that see calls of batch_norm, whether a module makes them or a function.

Under a mode `F.batch_norm` arrives as itself and then runs with the mode off, so that `torch.batch_norm` alone would
never be seen. What C++ calls by itself, as TorchScript does, is not seen at all.

Source: `torch.overrides.TorchFunctionMode`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from gradfold.errors import BatchNormError

__all__: list[str] = []

UNNAMED = "a functional batch_norm"


@dataclass
class ForwardContext:
    """A forward pass of one micro-batch: the layer that it is in, and whether its batch_norm was met there."""

    layer: str = UNNAMED
    is_met: bool = False


passage: ContextVar[ForwardContext | None] = ContextVar("passage", default=None)
"""That of the micro-batch that runs; None outside of a window's forward passes."""


class LayerTracker:
    """Listens to layers for the length of a `with` block."""

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._layers = layers
        self._names = {layer: name for name, layer in layers.items()}
        self._handles: list[RemovableHandle] = []
        self._seen: set[str] = set()
        self._versions = {name: _version(layer) for name, layer in layers.items()}

    def __enter__(self) -> LayerTracker:
        for layer in self._layers.values():
            self._handles.append(layer.register_forward_pre_hook(self._before))
            self._handles.append(layer.register_forward_hook(self._after))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self) -> None:
        """Raise BatchNormError where a layer has run without its hooks; one that has not run at all is no matter."""
        for name, layer in self._layers.items():
            if name not in self._seen and _version(layer) != self._versions[name]:
                raise _not_met(name)

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        name, own = self._names[layer], passage.get()  # type: ignore[index]
        self._seen.add(name)
        if own is None:  # the backward pass runs it
            raise refused_checkpoint(name)
        own.layer, own.is_met = name, False

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        own = passage.get()
        if own is None:
            return
        assert isinstance(layer, _BatchNorm)
        if not own.is_met and layer.training and isinstance(output, Tensor):
            raise _not_met(own.layer)
        own.layer = UNNAMED


def refused_checkpoint(name: str) -> BatchNormError:
    """The error that names the layer in a checkpoint."""
    return BatchNormError(
        f"BatchNorm in {name} runs inside an activation checkpoint (torch.utils.checkpoint), which would run it again "
        'for one micro-batch alone. With batch_norm="exact" what micro-batches save is kept in host memory anyway: '
        "leave the checkpoint out, or put it around parts without BatchNorm.",
        (name,),
    )


def refuse_scripted(model: nn.Module) -> None:
    """Raise BatchNormError where a scripted module normalizes by batch, which nobody can see."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and module.training and _has_batch_norm(module):
            raise BatchNormError(
                f"BatchNorm in {name or 'the model'} is scripted (torch.jit), where it cannot be met. For "
                'batch_norm="exact" leave the module unscripted, or put it into evaluation mode.',
                (name,),
            )


def _has_batch_norm(module: torch.jit.ScriptModule) -> bool:
    try:
        return "batch_norm" in str(module.inlined_graph)
    except RuntimeError:  # it has no forward
        return False


def is_in_checkpoint() -> bool:
    """Whether this thread is in a checkpoint of torch's, which saves nothing or runs without grad."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
        return True
    frame = None if torch.is_grad_enabled() else sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def _not_met(name: str) -> BatchNormError:
    return BatchNormError(
        f"BatchNorm in {name} ran where it cannot be met (a scripted or exported graph, or a kernel of its own), so it "
        'would normalize by micro-batch. For batch_norm="exact" use an ordinary nn.BatchNorm layer there, or put it '
        "into evaluation mode.",
        (name,),
    )


def _version(layer: _BatchNorm) -> int:
    tracked = layer.num_batches_tracked
    return 0 if tracked is None else tracked._version


_NAME = "num_batches_tracked"
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


class BatchCounters:
    """The counters of those layers whose forward is none of torch's."""

    def __init__(self, layers: Iterable[_BatchNorm]) -> None:
        self._layers = [
            layer for layer in layers if type(layer).forward not in _FORWARDS and layer._buffers.get(_NAME) is not None
        ]
        self._kept: list[tuple[_BatchNorm, Tensor, Tensor]] = []

    def keep(self) -> None:
        """The first micro-batch has come to a meeting, or to its end."""
        self._kept = []
        for layer in self._layers:
            counter = layer._buffers[_NAME]
            assert counter is not None
            self._kept.append((layer, counter, counter.detach().clone()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Another one has: it has counted, too."""
        for layer, counter, value in self._kept:
            layer._buffers[_NAME] = counter
            counter.copy_(value)


@dataclass(frozen=True)
class BatchNormCall:
    """The arguments of a call of batch_norm."""

    values: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    is_training: bool
    momentum: float
    eps: float


def _of_functional(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> BatchNormCall:
    return BatchNormCall(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _of_torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = False,
) -> BatchNormCall:
    return BatchNormCall(input, running_mean, running_var, weight, bias, training, momentum, eps)


_READERS: dict[Any, Callable[..., BatchNormCall]] = {
    F.batch_norm: _of_functional,
    torch.batch_norm: _of_torch,
}
_UNREAD = frozenset({torch.native_batch_norm, torch.cudnn_batch_norm, torch.batch_norm_stats})
_COUNTS = frozenset({Tensor.add_, Tensor.__iadd__})
_COUNTERS = frozenset({_BatchNorm.forward.__code__, nn.SyncBatchNorm.forward.__code__})


def normalizes_by_batch(call: BatchNormCall) -> bool:
    """Whether its statistics are those of what it is given."""
    return call.is_training


class BatchNormMode(TorchFunctionMode):
    """Hands calls of batch_norm that normalize by the statistics of the batch to a function.

    Args:
        on_call: gets the call, and gives what is returned instead.
        counts: whether layers count a batch, in this model or outside of it.
        concerns: which calls to hand over.
    """

    def __init__(
        self,
        on_call: Callable[[BatchNormCall], Any],
        counts: bool = True,
        concerns: Callable[[BatchNormCall], bool] = normalizes_by_batch,
    ) -> None:
        super().__init__()
        self._on_call = on_call
        self._counts = counts
        self._concerns = concerns
        self._counted: list[Tensor] = []

    @torch.no_grad()
    def count_back(self) -> None:
        """As if no layer had counted, in this model or outside of it."""
        while self._counted:
            self._counted.pop().sub_(1)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        reader = _READERS.get(func)
        if reader is not None:
            call = reader(*args, **kwargs)
            if self._concerns(call):
                return self._on_call(call)
        elif func in _UNREAD:
            raise BatchNormError(
                f"loss_fn calls torch.{func.__name__}, which gradfold does not follow. Call "
                "torch.nn.functional.batch_norm.",
                (),
            )
        elif func in _COUNTS and sys._getframe(1).f_code in _COUNTERS:
            if not self._counts:
                return args[0]
            self._counted.append(args[0])
        return func(*args, **kwargs)


def by_fixed_statistics(call: BatchNormCall) -> Tensor:
    """What the call would give with its running statistics, or else 0 and 1, which couple no rows."""
    mean, variance = call.running_mean, call.running_var
    if mean is None or variance is None:
        channels = call.values.new_zeros(
            call.values.shape[1], dtype=torch.promote_types(call.values.dtype, torch.float32)
        )
        mean, variance = channels, channels + 1
    return F.batch_norm(call.values, mean, variance, call.scale, call.shift, False, call.momentum, call.eps)
