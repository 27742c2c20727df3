"""An attendance: which BatchNorm layers run in a window, under which names, and whether each was met."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from gradfold.errors import BatchNormError

__all__: list[str] = []

UNNAMED = "a functional batch_norm"


@dataclass
class Passage:
    """A forward pass of one micro-batch: the layer that it is in, and whether its batch_norm was met there."""

    layer: str = UNNAMED
    is_met: bool = False


passage: ContextVar[Passage | None] = ContextVar("passage", default=None)
"""That of the micro-batch that runs; None outside of a window's forward passes."""


class Attendance:
    """Listens to layers for the length of a `with` block."""

    def __init__(self, layers: Mapping[str, _BatchNorm]) -> None:
        self._layers = layers
        self._names = {layer: name for name, layer in layers.items()}
        self._handles: list[RemovableHandle] = []
        self._seen: set[str] = set()
        self._versions = {name: _version(layer) for name, layer in layers.items()}

    def __enter__(self) -> Attendance:
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
    """Raise BatchNormError where a scripted module normalises by batch, which nobody can see."""
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
        'would normalise by micro-batch. For batch_norm="exact" use an ordinary nn.BatchNorm layer there, or put it '
        "into evaluation mode.",
        (name,),
    )


def _version(layer: _BatchNorm) -> int:
    tracked = layer.num_batches_tracked
    return 0 if tracked is None else tracked._version
