"""Turns: the micro-batches of ranks that hold shards, which run in step on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch
from gradfold.batch.split import MicroBatch
from gradfold.distributed.coordinators import DataParallelCoordinator
from gradfold.distributed.failure import settle_failure
from gradfold.distributed.fsdp import set_reducing, sharded_modules
from gradfold.distributed.process_group import ProcessGroup
from gradfold.distributed.settings import RankSettings
from gradfold.distributed.torch_private import drop_turn, groups_of
from gradfold.engine.loss_terms import LossTerms, loss_terms_of
from gradfold.engine.prefetch import prefetch
from gradfold.engine.strategy import Run
from gradfold.engine.window import Window
from gradfold.state.gradients import GradientBuffer
from gradfold.state.snapshot import Snapshot


class FsdpCoordinator(DataParallelCoordinator):
    """Several processes that hold a shard of every parameter each (FSDP2).

    Forward passes gather parameters and backward passes sum gradients, on all ranks at once. Nothing can run again on
    one rank alone.

    Args:
        grad_factor: that undoes the division of gradients by the number of ranks.
        reduces_once: whether gradients are summed over ranks in the last turn alone.
    """

    can_replay = can_probe = False
    runs_in_step = True
    runs_all_terms = True

    def __init__(self, group: ProcessGroup, settings: RankSettings, grad_factor: float, reduces_once: bool) -> None:
        super().__init__(group, settings)
        self.grad_factor = grad_factor
        self._reduces_once = reduces_once

    def run_in_step(self, run: Run, window: Window, indices: Sequence[int], snapshot: Snapshot) -> None:
        """Take as many turns as the rank with the most micro-batches that weigh something; no-op steps at the end.

        An error in the middle of a turn is rolled back where all ranks have it; an error on one rank ends the training
        on all.
        """
        self.read_denominators()
        busy = [index for index in indices if index not in window.zero_weight]
        sharded = sharded_modules(window.context.modules)
        self.meet()  # all are ready: from here on they are in the middle of turns
        self.is_awaited = False
        num_turns, no_op = _plan_turns(self.group, window, busy)
        try:
            for turn in range(num_turns):
                set_reducing(sharded, turn == num_turns - 1 or not self._reduces_once)
                if turn < len(busy):
                    run(window, [busy[turn]], snapshot)
                else:
                    window.backward(_no_op_terms(window, no_op))
        except BaseException as error:
            drop_turn(sharded)
            settle_failure(self.group, groups_of(sharded), error, "the middle of a turn of fully_shard")
            raise
        finally:
            set_reducing(sharded, True)
            for module in sharded:  # else the gradients of the model's parameters are not those of its shards
                module.reshard()
        self.is_awaited = True

    def end(self, losses: LossTerms, gradients: GradientBuffer) -> None:
        """[B]; gradients are summed already."""
        losses.settle()
        self._join(losses, b"")

    def all_finite(self, is_finite: bool) -> bool:
        """Whether loss and gradient are finite on all ranks, each of which sees a shard."""
        (num_not_finite,) = self.meet([0.0 if is_finite else 1.0])
        return not num_not_finite


def _plan_turns(group: ProcessGroup, window: Window, busy: Sequence[int]) -> tuple[int, Batch]:
    """How many turns ranks take, and what runs in no-op steps.

    These are rows of positive weight, of another rank where there are none here: 0 times the gradient of others may be
    NaN.
    """
    own = window.micro_batches[busy[0]].data if busy else None
    donor = group.rank if busy else group.size  # the first that has some
    most, fewest, first = group.maximum(torch.tensor([len(busy), -len(busy), -donor])).tolist()
    if fewest or not most:  # all are busy, or none is
        return most, own
    given = group.broadcast(own, -first)
    return most, own if busy else given


def _no_op_terms(window: Window, batch: Batch) -> list[tuple[Tensor, float]]:
    data = prefetch([MicroBatch(batch, range(0))], window.device)(0)
    return [(term, 0.0) for term in loss_terms_of(window.loss_fn(window.model, data)).values()]
