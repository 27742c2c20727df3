"""`gradfold.verify` on several ranks: their gradient beside that of one process with the rows of all."""

from __future__ import annotations

import subprocess
import sys

import pytest
from distributed import verify_cases
from processes import run, worlds


@pytest.fixture(scope="module", params=worlds(3))
def verdicts(request):
    return run(verify_cases.verify_all, request.param)


def test_what_is_right_is_proved_and_the_same_is_said_on_all_ranks(verdicts):
    for name in ("right", "inside", "dropout"):
        first = verdicts[0][name]
        assert first.ok and first.max_relative_error < 1e-12 and first.num_rows == verify_cases.ROWS, first
        assert all(str(other[name]) == str(first) for other in verdicts)
        together = [row for row in first.sizes if row.num_ranks == len(verdicts)]
        assert [row.size for row in together] == [2] and together[0].num_micro_batches == -(-6 // 2) - len(verdicts) % 2
    assert "0.dropout" not in str(verdicts[0]["right"]) and "evaluation mode" in str(verdicts[0]["dropout"])


def test_what_is_wrong_in_one_process_is_not_tried_on_several(verdicts):
    found = verdicts[0]["wrong weight"]
    assert not found.ok and found.causes[0].name == "weights"
    assert "one process" in found.notes[-1] and all(row.num_ranks == 1 for row in found.sizes)


def test_what_is_wrong_on_several_ranks_only_is_found(verdicts):
    for result in verdicts:
        found = result["by rank"]
        assert not found.ok and [cause.name for cause in found.causes] == ["ranks"]
        assert found.max_relative_error > 0.1
        assert str(found).startswith("NOT EXACT")


def test_errors_reach_all_ranks(verdicts):
    *others, last = (result["failing"] for result in verdicts)
    assert last == "LookupError: ill"
    assert all(text.startswith("DistributedError: rank ") and "LookupError: ill" in text for text in others)
    assert all("before fully_shard is applied" in result["sharded"] for result in verdicts)


@pytest.mark.slow
def test_the_command_starts_its_ranks_itself():
    command = [sys.executable, "-m", "gradfold", "verify", "digits", "--global-batch", "9", "--nproc", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("EXACT") == 1 and "on each of 2 ranks" in ended.stdout
