"""The state of a thread: what torch keeps for each thread by itself, taken from one and put on in another.

A new thread begins with grad mode on, no autocast, the default device, no modes and no hooks on saved tensors, whatever
is on in the thread that made it. torch's default dtype, number of threads, generators and determinism are the
process's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.overrides import _pop_mode as _pop_function_mode
from torch.overrides import _push_mode as _push_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode
from torch.utils._python_dispatch import _push_mode as _push_dispatch_mode

__all__: list[str] = []

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


class ThreadState:
    """What is on in the thread that makes it.

    Args:
        device: where the model is, whose stream the other threads are to use as well.

    Attributes:
        hooks: on saved tensors, the innermost pair; None where there are none.
    """

    def __init__(self, device: torch.device) -> None:
        self._has_grad = torch.is_grad_enabled()
        self._autocasts = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in {"cpu", device.type}
        ]
        self._has_autocast_cache = torch.is_autocast_cache_enabled()
        self._function_modes: list[TorchFunctionMode] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]  # default device included
        self._dispatch_modes: list[TorchDispatchMode] = _get_current_dispatch_mode_stack()
        self.hooks: Hooks | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Put it on in another thread."""
        # What makes torch tell OpenMP, which counts by thread, of torch.set_num_threads: else oneDNN would run
        # convolutions of each new thread on all cores, 100 times as slow where these are busy.
        torch.get_num_threads()
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self._has_grad))
            for kind, dtype, is_enabled in self._autocasts:
                if is_enabled:
                    stack.enter_context(torch.autocast(kind, dtype, cache_enabled=self._has_autocast_cache))
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            if self.hooks is not None:
                stack.enter_context(saved_tensors_hooks(*self.hooks))
            for dispatch_mode in self._dispatch_modes:
                _push_dispatch_mode(dispatch_mode)
                stack.callback(_pop_dispatch_mode)
            for function_mode in self._function_modes:
                _push_function_mode(function_mode)  # type: ignore[no-untyped-call]
                stack.callback(_pop_function_mode)
            yield
