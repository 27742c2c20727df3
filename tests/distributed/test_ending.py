"""The end of a training on several ranks: no process aborts because a thread of the backend is late."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from gradfold.distributed import process_group as ranks

SCRIPT = Path(__file__).parent / "ending_training.py"


def test_ranks_end_well_though_their_group_is_not_destroyed():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr


def test_what_was_sent_is_waited_for(monkeypatch):
    """A thread holds the tensor as gloo's do: beside Python."""
    monkeypatch.setattr(ranks, "_sent", [[torch.ones(2)]])
    ((sent,),) = ranks._sent
    held = [sent.view(2)]  # its base holds it
    threading.Timer(0.2, held.clear).start()
    assert ranks._is_held(sent)
    ranks.wait_for_threads()
    assert not held


def test_nobody_waits_for_ever(monkeypatch):
    monkeypatch.setattr(ranks, "_PATIENCE_S", 0.05)
    sent = torch.ones(2)
    view = sent.view(2)
    monkeypatch.setattr(ranks, "_sent", [[sent]])
    since = time.monotonic()
    ranks.wait_for_threads()
    assert ranks._is_held(sent) and view is not None and time.monotonic() - since >= 0.05
