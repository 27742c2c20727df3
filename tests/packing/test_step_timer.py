"""What a micro-step costs beside its tokens, told by a stopwatch."""

import pytest
import torch

from gradfold.batch.split import MicroBatch
from gradfold.packing import token_batcher as stopwatch
from gradfold.packing.token_batcher import StepTimer


def watched(sizes, seconds, monkeypatch):
    """A stopwatch that has seen micro-batches of these sizes, of one row where negative, and of these durations."""
    parts = [
        MicroBatch(None, range(1 if size < 0 else 2), width=abs(size) if size < 0 else size // 2) for size in sizes
    ]
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])

    def forward(index):
        now[0] += 0.25 * seconds[index]
        return index

    def backward(index):
        now[0] += 0.75 * seconds[index]

    watch = StepTimer(
        lambda indices, forward, backward: [backward(forward(index)) for index in indices], parts, torch.device("cpu")
    )
    watch(range(len(parts)), forward, backward)
    return watch


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
    assert watched(sizes, seconds, monkeypatch).overhead() == overhead
