"""A company: the ranks that form the statistics of a window together, and the agreement between them.

Beside the four meetings of `agreement.py` they meet at every joint call, in forward and backward order, and once when
forward passes and once when the backward pass is through. Each of these meetings begins with a *greeting* of three
numbers, in which a rank that has failed says so, so that none waits for it.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from gradfold.agreement import Together, Weigh
from gradfold.coupled.moments import Moments, merge
from gradfold.errors import BatchNormError
from gradfold.ranks import Ranks
from gradfold.window import OpenWindow, Schedule

__all__: list[str] = []


class Alone:
    """One process.

    Attributes:
        meets_in_backward: whether there are others to meet.
    """

    meets_in_backward = False

    def merge(self, own: Moments) -> Moments:
        """The moments of all ranks."""
        return own

    def sum(self, own: Tensor) -> Tensor:
        """The sum over all ranks, in the backward pass."""
        return own

    def begin_token(self, device: torch.device) -> Tensor:
        """What goes into the first joint call."""
        return torch.zeros((), device=device)

    def end_forward(self, num_calls: int) -> None:
        """All forward passes of this rank are through."""

    def end_backward(self) -> None:
        """And the backward pass."""


class InLockStep(Together):
    """Several processes whose micro-batches are in one set of statistics.

    Nothing can run again on one rank alone.
    """

    can_replay = False
    meets_in_backward = True

    def __init__(self, ranks: Ranks, weigh: Weigh, num_totals: int) -> None:
        super().__init__(ranks, weigh, num_totals)
        self._is_greeting = False  # whether others may wait at a greeting, if this rank fails

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and self.next is not None and self._wait is not None and self._is_read_by_all():
            if self._is_greeting:
                self._is_greeting = False
                self.ranks.begin_gather([1.0, 0.0, 0.0])()
        super().__exit__(kind, error, traceback)

    def around(self, schedule: Schedule, window: OpenWindow) -> Schedule:
        """As it is: what weighs nothing runs as the rest."""
        return schedule
