"""A rank that is killed ends the others, by torchrun's rules, and the run goes on from its last checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "resumable_training.py"


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_resumes_bit_for_bit(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir()
    broken.mkdir()
    assert torchrun(unbroken).returncode == 0
    killed = torchrun(broken, 3)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    assert torch.load(broken / "0.pt", weights_only=True)["step"]["updates"] == 3
    resumed = torchrun(broken)
    assert resumed.returncode == 0, resumed.stderr
    assert "rank 1 goes on at update 3" in resumed.stdout
    for rank in (0, 1):
        ours, theirs = (torch.load(folder / f"{rank}.pt", weights_only=True) for folder in (broken, unbroken))
        assert ours.pop("step") == theirs.pop("step")
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
