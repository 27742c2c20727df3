"""The end of a training on several ranks: no process aborts because a thread of the backend is late."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradfold.distributed import process_group as ranks


def torchrun(script):
    path = Path(__file__).parent / script
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_ranks_end_well_though_their_group_is_not_destroyed():
    ended = torchrun("ending_training.py")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_a_rank_that_ends_before_the_others_is_told():
    ended = torchrun("uneven_training.py")
    assert ended.returncode != 0
    assert "DistributedError: another rank has ended or cannot be reached" in ended.stderr


class Clock:
    """Time that passes only in sleep; after some naps a thread lets go of what it holds."""

    def __init__(self, held, num_naps):
        self.now, self.held, self.num_naps = 0.0, held, num_naps

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.num_naps -= 1
        if self.num_naps == 0:
            self.held.clear()


@pytest.fixture
def sent(monkeypatch):
    """A tensor that was sent, and what a thread holds of it as gloo's do: beside Python, by a view with this base."""
    sent = torch.ones(2)
    monkeypatch.setattr(ranks, "_sent", [sent])
    return sent, [sent.view(2)]


def test_what_was_sent_is_waited_for(monkeypatch, sent):
    tensor, held = sent
    clock = Clock(held, num_naps=3)
    monkeypatch.setattr(ranks, "time", clock)
    assert ranks.is_shared(tensor)
    ranks.wait_for_threads()
    assert clock.num_naps == 0 and not ranks.is_shared(tensor)


def test_the_wait_ends(monkeypatch, sent):
    tensor, held = sent
    clock = Clock(held, num_naps=10**9)
    monkeypatch.setattr(ranks, "time", clock)
    ranks.wait_for_threads()
    assert ranks.is_shared(tensor) and clock.now >= ranks._PATIENCE_S
