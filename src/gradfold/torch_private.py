"""The private parts of torch that gradfold uses, each with the version it was seen on.

Everything here was seen on torch 2.13.0 (CPU). What is missing in another version fails here, by name, and only here.
A package that alone needs private parts has its own `torch_private.py`.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import _engine_run_backward
from torch.nn.modules.batchnorm import _NormBase

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
