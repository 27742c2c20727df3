"""What a micro-step costs beside its tokens, told by a timer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradfold.batch.split import MicroBatch
from gradfold.engine.strategy import Sequential, Strategy
from gradfold.engine.window import Context
from gradfold.packing import token_batcher
from gradfold.packing.token_batcher import StepTimer


class Clocked:
    """A window whose passes take as long as they are told to."""

    def __init__(self, parts, seconds):
        self.context, self.device = Context(nn.Linear(1, 1)), torch.device("cpu")
        self.micro_batches, self.seconds = parts, seconds
        self.now = 0.0

    def forward(self, index):
        self.now += 0.25 * self.seconds[index]
        return index

    def backward(self, index):
        self.now += 0.75 * self.seconds[index]


def timed(sizes, seconds, monkeypatch, strategy=None):
    """A timer of micro-batches of these sizes, of one row where negative, and of these durations."""
    parts = [
        MicroBatch(None, range(1 if size < 0 else 2), width=abs(size) if size < 0 else size // 2) for size in sizes
    ]
    window = Clocked(parts, seconds)
    monkeypatch.setattr(token_batcher.time, "perf_counter", lambda: window.now)
    timer = StepTimer(strategy or Sequential(lambda model, batch: None))
    timer.run(window, range(len(parts)), None)
    assert window.now == pytest.approx(sum(seconds)), "every micro-batch has run once"
    return timer


@pytest.mark.parametrize(
    ("sizes", "seconds", "overhead"),
    [
        ([400, 380, -20, -20, -20], [0.5, 0.48, 0.12, 0.12, 0.12], 128.0),  # 0.1 s + 1 ms a token: 100 tokens
        ([400, 380, -20, -20, -20], [0.402, 0.382, 0.022, 0.022, 5.0], 2.0),  # one was disturbed
        ([400, -20], [0.1, 0.1], 512.0),  # all is overhead: no more than the largest
        ([400, -20], [0.4, 0.01], 1.0),  # none to be seen
        ([400, -300], [0.4, 0.3], None),  # too alike to tell
    ],
)
def test_what_a_micro_step_costs_is_read_off_large_and_tiny_ones(sizes, seconds, overhead, monkeypatch):
    assert timed(sizes, seconds, monkeypatch).overhead() == overhead


class ForwardsFirst(Strategy):
    """All forward passes, then all backward passes: no micro-batch has a time of its own."""

    def run(self, window, indices, snapshot):
        for weighed in [window.forward(index) for index in indices]:
            window.backward(weighed)

    def is_sequential(self, context):
        return False


def test_micro_batches_that_run_together_are_not_timed(monkeypatch):
    timer = timed([400, -20], [0.1, 0.1], monkeypatch, ForwardsFirst(lambda model, batch: None))
    assert timer.overhead() is None
