"""No test of this package depends on the speed of the machine."""

from __future__ import annotations

from itertools import count

import pytest

from gradfold.distributed.process_group import TuningGroup


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A clock on which every step takes 20 ms: what a search finds does not depend on the machine."""
    ticks = count()
    monkeypatch.setattr(TuningGroup, "clock", lambda self: 0.02 * next(ticks))
    monkeypatch.setattr(TuningGroup, "stopwatch", lambda self, device: self.clock)
