"""Private API of torch that this package needs. Seen on torch 2.13.0 (CPU).

Each entry says what it is for, and what would be lost without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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
