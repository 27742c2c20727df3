"""The private parts of torch that gradfold uses, each with the version it was seen on.

Everything here was seen on torch 2.13.0 (CPU). What is missing in another version fails here, by name, and only here.
A package that alone needs private parts has its own `torch_private.py`.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter, methodcaller
from typing import Any, TypeAlias

import torch
from torch.autograd.graph import _engine_run_backward
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import _pop_mode as _pop_function_mode
from torch.utils._python_dispatch import _pop_mode as _pop_dispatch_mode

NormBase = _NormBase
"""The base of layers with running statistics. Without it: `nn.BatchNorm1d` and its relatives, one by one."""

check_and_unscale = torch._amp_foreach_non_finite_check_and_unscale_
"""The kernel of `torch.amp.GradScaler.unscale_`. Without it: `isfinite().all()` of each gradient."""

foreach_add, foreach_copy, foreach_norm = torch._foreach_add_, torch._foreach_copy_, torch._foreach_norm
"""One call for many tensors. Without them: a loop over `add_`, `copy_`, `norm`."""

set_versions = torch._C._autograd._unsafe_set_version_counter
"""Sets the version counters of a tuple of tensors. Without it: what was put back counts as changed."""

run_backward = _engine_run_backward
"""What `torch.autograd.backward` calls once it has checked its arguments. The check takes as long as a small layer, and
a plain loss with its grad_output needs none. Without it: `torch.autograd.backward`."""

ACCUMULATE_GRAD = "torch::autograd::AccumulateGrad"
"""The name of a node that adds to a leaf's `.grad`. Without it: no leaf is found in a graph."""

read_number = torch._C.TensorBase.item
"""`Tensor.item` beneath the doctor's hook on host reads. Without it: the doctor records reads of gradfold's own."""

without_dispatch = torch._C._DisableTorchDispatch
"""A block that dispatch modes do not see. Without it: they see the random states that are recorded."""


def has_unscaled(scaler: torch.amp.GradScaler) -> bool:
    """Whether a loss scaler has unscaled gradients since its last update (`_per_optimizer_states`), or may have.

    Nothing else tells: the kernel does not move version counters. Without it: gradients of two scales go unnoticed.
    """
    states = getattr(scaler, "_per_optimizer_states", None)
    return states is None or any(state["found_inf_per_device"] for state in states.values())


_c: Any = torch._C
_hooks: Any = torch._C._autograd
Settings: TypeAlias = "tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...]"
"""Each as what reads it, in C, and what writes it."""

# torch.backends has public setters of most of them, but none of the priority order and of "overrideable". Without them:
# sdpa_kernel and torch.backends.cudnn.flags around a BatchNorm would leak into the forward passes of others.
PROCESS_SETTINGS: Settings = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (
        _c._get_deterministic_algorithms,
        lambda on: _c._set_deterministic_algorithms(on, warn_only=_c._get_deterministic_algorithms_warn_only()),
    ),
    (
        _c._get_deterministic_algorithms_warn_only,
        lambda on: _c._set_deterministic_algorithms(_c._get_deterministic_algorithms(), warn_only=on),
    ),
    (torch.is_anomaly_enabled, lambda on: torch.set_anomaly_enabled(on, torch.is_anomaly_check_nan_enabled())),
    (torch.is_anomaly_check_nan_enabled, lambda on: torch.set_anomaly_enabled(torch.is_anomaly_enabled(), on)),
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
"""What torch keeps once per process and code blocks change: dtype, determinism, back ends of attention."""


def _pop_down(depth: Callable[[], int], pop: Callable[[], Any]) -> Callable[[int], None]:
    """Empties a stack down to the depth that it had."""

    def write(wanted: int) -> None:
        while depth() > wanted:
            pop()

    return write


def _pop_hooks(wanted: Any) -> None:
    while top_saved_tensor_hooks() not in (wanted, None):
        _hooks._pop_saved_tensors_default_hooks()


def _leave_autocast(wanted: int) -> None:
    depth = torch.autocast_increment_nesting()
    while depth > wanted:
        depth = torch.autocast_decrement_nesting()
    if wanted == 0:
        torch.clear_autocast_cache()


def _set_filters(filters: Any) -> None:
    warnings.filters = filters
    warnings._filters_mutated()  # type: ignore[attr-defined]


top_saved_tensor_hooks: Callable[[], Any] = partial(_hooks._top_saved_tensors_default_hooks, True)
"""The innermost `saved_tensors_hooks`, or None; those of activation checkpointing are among them. Without it: none."""

_function_depth, _dispatch_depth = _c._len_torch_function_stack, _c._len_torch_dispatch_stack

# Without them: an interrupt in the exit of torch.no_grad, autocast, a mode or warnings.catch_warnings leaves it on.
THREAD_SETTINGS: Settings = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (_function_depth, _pop_down(_function_depth, _pop_function_mode)),
    (_dispatch_depth, _pop_down(_dispatch_depth, _pop_dispatch_mode)),
    *(
        (partial(read, kind), partial(write, kind))
        for kind in ("cpu", "cuda")
        for read, write in (
            (torch.is_autocast_enabled, torch.set_autocast_enabled),
            (torch.get_autocast_dtype, torch.set_autocast_dtype),
        )
    ),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    # The depth of autocast blocks can be read only by one step up and one down. At 0 cached weights are dropped.
    (torch.autocast_increment_nesting, lambda one_up: None),
    (torch.autocast_decrement_nesting, _leave_autocast),
    (top_saved_tensor_hooks, _pop_hooks),
)
"""What torch keeps once per thread and code blocks change."""

BLOCK_SETTINGS: Settings = (
    *THREAD_SETTINGS,
    (partial(getattr, warnings, "filters"), _set_filters),
    (_c._get_warnAlways, _c._set_warnAlways),
    *PROCESS_SETTINGS,
)
"""What `with` blocks change, in this thread or the process."""

# operator.call, of Python 3.11, is faster.
CALL: Callable[..., Any] = getattr(operator, "call", methodcaller("__call__"))
THREAD_READERS, BLOCK_READERS = (tuple(map(itemgetter(0), settings)) for settings in (THREAD_SETTINGS, BLOCK_SETTINGS))


def read_settings(settings: Settings) -> list[Any]:
    """Their values, read in one call of C, which no interrupt divides."""
    return list(map(CALL, map(itemgetter(0), settings)))


def apply_settings(settings: Settings, wanted: Sequence[Any]) -> None:
    """Change those that differ."""
    for (_, write), value, now in zip(settings, wanted, read_settings(settings), strict=True):
        if now is not value and now != value:
            write(value)
