"""What this package uses of torch that is not public, as seen in torch 2.13 on a CPU, and what happens without it.

- `FakeTensor`, `FakeTensorMode` (`torch._subclasses`): tensors with a shape and no memory. Without them every
  prediction comes from probes, which are real runs of a few rows.
- `active_fake_mode` (`torch._guards`): tells operators of the traced program from those that DTensor runs on fakes of
  its own to learn shapes. Without it plans for shards count memory that does not exist.
- `BatchNormBase` (`torch.nn.modules.batchnorm`): without it the statistics that a window keeps do not count.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import torch
from torch._guards import active_fake_mode as active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase

__all__ = ["BatchNormBase", "FakeTensor", "FakeTensorMode", "active_fake_mode"]


def is_in_backward() -> bool:
    """Whether autograd runs a backward pass on this thread. Without it saved activations count as temporaries."""
    return bool(torch._C._current_graph_task_id() != -1)


def address_of(storage: torch.UntypedStorage) -> int:
    """The address of a storage in C++, the same for all Python objects of it. Without it views count twice."""
    return int(storage._cdata)


def resizes_noted(note: Callable[[torch.UntypedStorage], None]) -> AbstractContextManager[object]:
    """Call `note` with a storage before and after each `resize_`, which no operator shows.

    By it FSDP frees and refills whole parameters, which would count all the time.
    """
    resize = torch.UntypedStorage.resize_

    def noted(storage: torch.UntypedStorage, size: int) -> object:
        note(storage)
        made = resize(storage, size)
        note(storage)
        return made

    return mock.patch.object(torch.UntypedStorage, "resize_", noted)
