"""Turns: the micro-batches of ranks that hold shards, which run in step on all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradfold.batch.nesting import Batch
from gradfold.batch.split import MicroBatch
from gradfold.distributed.coordinators import FsdpCoordinator
from gradfold.distributed.fsdp import set_reducing, sharded_modules
from gradfold.distributed.process_group import is_lost, sever
from gradfold.distributed.torch_private import default_store, drop_turn, groups_of
from gradfold.engine.loss_terms import loss_terms_of
from gradfold.engine.prefetch import prefetch
from gradfold.engine.strategy import Run
from gradfold.engine.window import Window
from gradfold.errors import DistributedError
from gradfold.state.snapshot import Snapshot

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

IN_STEP_S = 10.0
"""How far apart ranks may be that fail at the same place."""

_ENDED = (
    " in the middle of a turn, where ranks under fully_shard wait for each other, so the training has ended on all; go "
    "on from a checkpoint"
)


def take_turns(
    coordinator: FsdpCoordinator,
    run: Run,
    reduces_once: bool,
    window: Window,
    indices: Sequence[int],
    snapshot: Snapshot,
) -> None:
    """Take as many turns as the rank with the most micro-batches of positive weight, with no-op steps at the end.

    `reduces_once` sums gradients over ranks in the last turn alone. An error in the middle of a turn is rolled back
    where all ranks have it; an error on one rank ends the training on all.
    """
    coordinator.read_denominators()
    busy = [index for index in indices if index not in window.zero_weight]
    sharded = sharded_modules(window.context.modules)
    coordinator.meet()  # all are ready: from here on they are in the middle of turns
    coordinator.is_awaited = False
    num_turns, no_op = _plan_turns(coordinator, window, busy)
    try:
        for turn in range(num_turns):
            set_reducing(sharded, turn == num_turns - 1 or not reduces_once)
            if turn < len(busy):
                run(window, [busy[turn]], snapshot)
            else:
                window.backward(_no_op_terms(window, no_op))
    except BaseException as error:
        drop_turn(sharded)
        _settle_failure(coordinator, sharded, error)
        raise
    finally:
        set_reducing(sharded, True)
        for module in sharded:  # else the gradients of the model's parameters are not those of its shards
            module.reshard()
    coordinator.is_awaited = True


def _settle_failure(coordinator: FsdpCoordinator, sharded: Sequence[FSDPModule], error: BaseException) -> None:
    """Wait until all ranks have failed; where they do not, end the training on all.

    The others wait in the middle of a turn, where a rank can tell them nothing but by the store, and that it is gone.

    Raises:
        DistributedError: another rank was the first to fail, and the reason why this one did.
    """
    group, store = coordinator.group, default_store()
    key = f"gradfold/{group.group.group_name}"
    is_first = not (isinstance(error, RuntimeError) and is_lost(error))
    if is_first:
        num_failed = store.add(f"{key}/failed", 1)
        num_when_alike = -(-num_failed // group.size) * group.size  # with those of earlier turns that all ranks left
        deadline = time.monotonic() + IN_STEP_S
        while store.add(f"{key}/failed", 0) < num_when_alike and time.monotonic() < deadline:
            time.sleep(0.005)
        if store.add(f"{key}/failed", 0) >= num_when_alike:
            return
        store.set(f"{key}/text", f"rank {group.rank} has failed{_ENDED}. {type(error).__name__}: {error}")
    for one in {id(one): one for one in (group.group, *groups_of(sharded))}.values():
        sever(one)
    if not is_first:
        is_told = store.check([f"{key}/text"])
        text = store.get(f"{key}/text").decode() if is_told else f"another rank cannot be reached{_ENDED}."
        raise DistributedError(text) from error


def _plan_turns(coordinator: FsdpCoordinator, window: Window, busy: Sequence[int]) -> tuple[int, Batch]:
    """How many turns ranks take, and what runs in no-op steps.

    These are rows of positive weight, of another rank where there are none here: 0 times the gradient of others may be
    NaN.
    """
    group, own = coordinator.group, window.micro_batches[busy[0]].data if busy else None
    donor = group.rank if busy else group.size  # the first that has some
    most, fewest, first = group.maximum(torch.tensor([len(busy), -len(busy), -donor])).tolist()
    if fewest or not most:  # all are busy, or none is
        return most, own
    given = group.broadcast(own, -first)
    return most, own if busy else given


def _no_op_terms(window: Window, batch: Batch) -> list[tuple[Tensor, float]]:
    data = prefetch([MicroBatch(batch, range(0))], window.device)(0)
    return [(term, 0.0) for term in loss_terms_of(window.loss_fn(window.model, data)).values()]
