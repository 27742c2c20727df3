"""A fault on one rank, at every operator outside of meetings: the right gradient on all, or an error on all."""

from __future__ import annotations

import pytest
import torch
from distributed import ddp_cases, fault_cases
from processes import run, world
from reference import relative_error

FAULTY, SIZE = 1, 2
pytestmark = world(SIZE)


@pytest.fixture(scope="module")
def num_points():
    (_, *rest), *_ = run(fault_cases.run_points, SIZE, FAULTY, "a bug", [0])[FAULTY]
    assert rest[-1] > 150
    return rest[-1]


@pytest.mark.parametrize("error", fault_cases.ERRORS)
def test_all_ranks_end_alike(num_points, error):
    points = range(1, num_points + 1)
    by_rank = run(fault_cases.run_points, SIZE, FAULTY, error, points)
    expected, _, _ = ddp_cases.expect("samples")
    num_right = 0
    for at, outcomes in zip(points, zip(*by_rank, strict=True), strict=True):
        if isinstance(outcomes[FAULTY][0], dict):
            num_right += 1
            for found, *_ in outcomes:
                assert relative_error(found, expected) < 1e-12, at
                assert all(torch.equal(one, outcomes[0][0][name]) for name, one in found.items()), at
            continue
        for rank, (name, text, is_rolled_back, _) in enumerate(outcomes):
            assert is_rolled_back, at
            if rank == FAULTY:
                assert text == "injected", at
            else:
                kind = outcomes[FAULTY][0]
                assert (name, text) == (
                    "DistributedError",
                    f"rank {FAULTY} failed; the window was rolled back on all ranks. {kind}: injected",
                ), at
    # Memory that runs out between the opening and the close is recovered from; all else ends the window.
    assert (num_right > 0.8 * num_points) == (error == "out of memory")
