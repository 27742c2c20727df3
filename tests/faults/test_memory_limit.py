"""Real allocation failures: under `ulimit -v` torch's CPU allocator fails, and the training goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.memory_limit import NUM_UPDATES, SHARES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit of the address space"),
]

ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"

# Memory that is freed goes back to the system at once: what fits then depends on the limit, and little on the order in
# which the heap was filled. One arena, one thread, and so no address space that only threads reserve.
STEADY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def report():
    program = [sys.executable, "-W", "error", str(Path(__file__).with_name("memory_limit.py"))]
    ended = subprocess.run(program, env={**os.environ, **STEADY}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("index", range(len(SHARES)))
def test_a_training_goes_through_where_the_full_batch_does_not_fit(report, index):
    limit = report["limits"][index]
    assert report["mib"] > 128
    assert ALLOCATOR in limit["plain"], "the counter-example: plain torch under the same limit"
    assert len(limit["updates"]) == NUM_UPDATES
    first, *later = limit["updates"]
    assert first["sizes"], "nothing failed"
    assert set(first["causes"]) == {"out_of_memory"}
    assert first["num_micro_batches"] > 1
    assert all(ALLOCATOR in message for message in limit["messages"])
    assert all(update["error"] <= 1e-12 for update in limit["updates"])
    assert all(not update["sizes"] and update["num_micro_batches"] > 1 for update in later), "the size did not hold"
    assert len(limit["messages"]) == len(first["sizes"])


def test_the_tighter_the_limit_the_smaller_the_micro_batches(report):
    sizes = [limit["updates"][0]["sizes"][-1] for limit in report["limits"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_one_row_that_does_not_fit_is_refused_and_the_process_goes_on(report):
    found = report["too_little"]
    assert found["sizes"] == [4, 2, 1]
    assert found["message"].startswith("one row does not fit in memory (row 0): tried 4, 2 and 1 rows at once.")
    assert ALLOCATOR in found["message"]
    assert len(found["messages"]) == 3
    assert found["is_untouched"], "the gradient that stood there"
    assert (found["updates"], found["recoveries"]) == (2, 0)
