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


@pytest.fixture(scope="module", params=worlds(2))
def tensor_parallel(request):
    return run(mesh_cases.tensor_parallel, request.param)


def test_tensor_parallel_ranks_have_the_gradient_and_the_proof(tensor_parallel):
    for results in tensor_parallel:
        found, following, (ok, causes, error) = results["right"]
        assert relative_error(found, mesh_cases.expect_tensor_parallel()) < 1e-12
        assert relative_error(following, mesh_cases.expect_tensor_parallel()) < 1e-12
        assert (ok, causes) == (True, []) and error < 1e-12


@pytest.mark.parametrize(
    ("name", "kind", "causes"),
    [("a sum", "NotDecomposableError", ["sum"]), ("coupled", "NotDecomposableError", ["coupled"])],
)
def test_what_cannot_be_split_is_named_on_all_tensor_parallel_ranks(tensor_parallel, name, kind, causes):
    """The self-check ended in torch's "mixed torch.Tensor and DTensor"."""
    texts = set()
    for results in tensor_parallel:
        found, following, (ok, named, error) = results[name]
        texts.add(found)
        assert not ok and named == causes and error > 0.1
        assert relative_error(following, mesh_cases.expect_tensor_parallel()) < 1e-12
    ((found_kind, _),) = texts
    assert found_kind == kind


def test_a_gradient_that_is_not_finite_on_one_tensor_parallel_rank_is_named_on_all(tensor_parallel):
    for results in tensor_parallel:
        (kind, text), following, _ = results["not finite on one rank"]
        assert kind == "NonFiniteGradientError" and "0.weight" in text
        assert relative_error(following, mesh_cases.expect_tensor_parallel()) < 1e-12
