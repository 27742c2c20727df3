"""Private API of torch that this package needs. Seen on torch 2.13.0 (CPU).

Each entry says what it is for, and what would be lost without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.multiprocessing import reductions
from torch.nn.modules.batchnorm import _BatchNorm

# Without it: calls of `F.batch_norm` outside of a layer are not found.
from torch.overrides import TorchFunctionMode as TorchFunctionMode
from torch.overrides import _get_current_function_mode_stack
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _push_mode as _push_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode
from torch.utils.checkpoint import CheckpointFunction

SavedTensorHooks: TypeAlias = "tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]"

# The base class of BatchNorm1d, 2d, 3d, the lazy ones and SyncBatchNorm. Without it: a tuple of these classes, which
# misses subclasses that users derive from the base.
BatchNorm = _BatchNorm

# A weak reference to a storage. Without it: a storage whose address is used again could be taken for a freed one.
StorageWeakRef: Any = reductions.StorageWeakRef

BATCH_NORM_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
"""The forward methods that torch's own layers have; a layer with another one was written by the user."""


def saved_tensor_hooks() -> SavedTensorHooks | None:
    """The innermost hooks on saved tensors of this thread. Without it: a new thread would not have the user's hooks."""
    hooks: SavedTensorHooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks


def is_in_checkpoint() -> bool:
    """Whether this thread is in an activation checkpoint, known by its hooks (no reentry) or its frame (reentrant).

    Without it: a BatchNorm in there would wait for the other micro-batches again in the backward pass, and fail late.
    """
    hooks = saved_tensor_hooks()
    if hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint":
        return True
    frame = None if torch.is_grad_enabled() else sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def modes_of_this_thread() -> Callable[[], AbstractContextManager[None]]:
    """Blocks in which another thread has the function modes (the default device is one) and dispatch modes of this one.

    Without it: new threads would run outside of them. They are pushed, since entering would run their set-up again.
    """
    function_modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    dispatch_modes = _get_current_dispatch_mode_stack()

    @contextmanager
    def pushed() -> Iterator[None]:
        with ExitStack() as stack:
            for mode in dispatch_modes:
                _push_dispatch_mode(mode)
                stack.callback(_pop_dispatch_mode)
            for mode in function_modes:
                _push_function_mode(mode)  # type: ignore[no-untyped-call]
                stack.callback(_pop_function_mode)
            yield

    return pushed


def read_settings() -> list[Any]:
    """What torch keeps once per process and code blocks change: dtype, determinism, back ends of attention."""
    return [read() for read, _ in _SETTINGS]


def apply_settings(wanted: Sequence[Any]) -> None:
    """Change the settings that differ from these."""
    for (read, write), value in zip(_SETTINGS, wanted, strict=True):
        if read() != value:
            write(value)


_c: Any = torch._C

# torch.backends has public setters of most of them, but none of the priority order and of "overrideable". Without them:
# sdpa_kernel and torch.backends.cudnn.flags around a BatchNorm would leak into the forward passes of others.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1]),
    ),
    (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda both: torch.set_anomaly_enabled(*both),
    ),
    (_c._get_sdp_priority_order, _c._set_sdp_priority_order),
    *(
        (getattr(_c, f"_get_{kind}_sdp_enabled"), getattr(_c, f"_set_sdp_use_{kind}"))
        for kind in ("flash", "mem_efficient", "math", "cudnn", "overrideable")
    ),
    *(
        (getattr(_c, f"_get_{name}"), getattr(_c, f"_set_{name}"))
        for name in ("cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic", "mkldnn_enabled")
    ),
)
