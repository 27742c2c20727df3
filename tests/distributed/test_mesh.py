"""Ranks that share their data (tensor parallel) are no data-parallel ranks: rows count once."""

from __future__ import annotations

import pytest
import torch
from distributed import mesh_cases
from processes import run, worlds
from reference import relative_error


@pytest.fixture(scope="module", params=worlds(4))
def ranks(request):
    return run(mesh_cases.run_cases, request.param)


@pytest.mark.parametrize("name", ["DistributedDataParallel", "fully_shard", "fully_shard of tensor-parallel layers"])
def test_the_gradient_is_that_of_all_rows_once(ranks, name):
    expected, loss = mesh_cases.expect()
    for rank, result in enumerate(ranks):
        gradient, found, weight, num_micro_batches = result[name]
        assert relative_error(gradient, expected) < 1e-12
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
        assert weight == 23 and num_micro_batches == (4 if rank < 2 else 2)
