"""Turns: the micro-batches of ranks that hold a shard of every parameter each (fully_shard).

Passes gather parameters and sum gradients on all ranks at once. So all take as many turns as the one with the most
micro-batches; the others run no-op steps, whose loss has weight 0. An error in the middle of a turn ends the training
on all ranks, as it does without gradfold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from gradfold.batch.nesting import Batch
from gradfold.batch.split import MicroBatch
from gradfold.distributed.coordinators import FsdpCoordinator
from gradfold.distributed.fsdp import set_reducing, sharded_modules
from gradfold.engine.loss_terms import loss_terms_of
from gradfold.engine.prefetch import prefetch
from gradfold.engine.strategy import Run
from gradfold.engine.window import Window
from gradfold.state.snapshot import Snapshot

NoOpRows: TypeAlias = "tuple[Batch, list[str] | None]"
"""Rows for no-op steps, and the loss terms of positive weight there (None: all)."""


def take_turns(
    coordinator: FsdpCoordinator,
    run: Run,
    reduces_once: bool,
    window: Window,
    indices: Sequence[int],
    snapshot: Snapshot,
) -> None:
    """The micro-batches of positive weight, then no-op steps until all ranks have taken as many turns.

    `reduces_once` sums gradients over ranks in the last turn alone.
    """
    coordinator.read_denominators()
    busy = [index for index in indices if index not in window.zero_weight]
    num_turns = max(coordinator.num_busy)
    sharded = sharded_modules(window.context.modules)
    coordinator.exchange(None)  # all are ready: from here on they are in the middle of turns
    coordinator.next = None
    no_op = _no_op_rows(coordinator, window, busy)
    try:
        for turn in range(num_turns):
            set_reducing(sharded, turn == num_turns - 1 or not reduces_once)
            if turn < len(busy):
                run(window, [busy[turn]], snapshot)
            else:
                window.backward(_no_op_terms(window, *no_op))
    finally:
        set_reducing(sharded, True)
    coordinator.next = "exchange"


def _no_op_rows(coordinator: FsdpCoordinator, window: Window, busy: Sequence[int]) -> NoOpRows:
    """What runs in no-op steps: rows of positive weight, since 0 times the gradient of others may be NaN."""
    own = (window.micro_batches[busy[0]].data, window.weights.names_at(busy[0])) if busy else (None, None)
    is_busy = list(map(bool, coordinator.num_busy))
    if all(is_busy) or not any(is_busy):
        return own
    donor = is_busy.index(True)
    given = coordinator.group.exchange(own if coordinator.rank == donor else (None, None))[donor]
    return own if busy else given


def _no_op_terms(window: Window, batch: Batch, names: list[str] | None) -> list[tuple[Tensor, float]]:
    data = prefetch([MicroBatch(batch, range(0))], window.device)(0)
    terms = loss_terms_of(window.loss_fn(window.model, data))
    return [(term, 0.0) for name, term in terms.items() if names is None or name in names]
