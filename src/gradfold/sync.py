"""Synchronisation of gradients between processes: this version trains in one process and refuses several by name."""

from __future__ import annotations

import torch.distributed

from gradfold.errors import RanksError

__all__: list[str] = []

_IS_AVAILABLE = torch.distributed.is_available()


def refuse_several_ranks() -> None:
    """Raise RanksError if more than one process trains together.

    The denominators of a window would have to be summed over all ranks, and gradients reduced once per window.
    """
    if _IS_AVAILABLE and torch.distributed.is_initialized():
        world_size = torch.distributed.get_world_size()
        if world_size > 1:
            raise RanksError(
                f"{world_size} processes train together, and this version of gradfold accumulates in one process "
                "only: the weights would have to be summed over all ranks. Accumulate by hand under no_sync(), with "
                "loss sums divided by the all-reduced count and multiplied by the number of ranks."
            )
