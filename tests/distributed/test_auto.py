"""A micro-batch that sets itself under DistributedDataParallel: a size per rank, one gradient, no rank that waits."""

from __future__ import annotations

import pytest
import torch
from distributed import auto_cases, ddp_cases
from processes import run, world
from reference import relative_error

SIZE = 2
pytestmark = world(SIZE)


@pytest.fixture(scope="module")
def ranks():
    return run(auto_cases.run_all, SIZE, timeout_s=150)  # searches, on a machine that may be busy


def assert_gradient_of_all_rows(found, expected):
    for of_rank in found:
        assert of_rank.keys() == expected.keys()
        present = {name: one for name, one in expected.items() if one is not None}
        assert relative_error({name: of_rank[name] for name in present}, present) < 1e-12
        assert all(one is None or torch.equal(one, found[0][name]) for name, one in of_rank.items())


@pytest.mark.parametrize("name", auto_cases.NAMES)
def test_ranks_take_different_sizes(ranks, name):
    expected, _, _ = ddp_cases.expect(name)
    assert_gradient_of_all_rows([result[name][0] for result in ranks], expected)
    assert [result[name][1] for result in ranks] == [1, 2, 5][: len(ranks)]


def whole_batch(model):
    auto_cases.regression(model, auto_cases.regression_batch()).backward()
    return ddp_cases.gradients(model)


def test_sizes_that_are_bounded_by_probes(ranks):
    expected = whole_batch(auto_cases.Recurrent())
    assert_gradient_of_all_rows([result["probes"][0] for result in ranks], expected)
    assert all(result["probes"][1] > 0 for result in ranks)


def test_one_rank_may_search_while_others_know(ranks):
    expected, _, _ = ddp_cases.expect("samples")
    assert_gradient_of_all_rows([result["one rank searches"][0] for result in ranks], expected)
    assert all(result["one rank searches"][1] for result in ranks)


def test_one_rank_may_choose_by_itself(ranks):
    for rank, result in enumerate(ranks):
        means, size = result["chosen on one rank"]
        assert means.tolist() == [float(rank)] * 3 and size >= 1


def test_a_rank_on_which_nothing_fits_ends_the_window_on_all(ranks):
    expected, _, _ = ddp_cases.expect("samples")
    last = len(ranks) - 1
    for rank, result in enumerate(ranks):
        twice, is_clean, _ = result["memory for none"]
        assert is_clean
        for name, text in twice:
            assert "not even one row fits into 300.0 MiB" in text
            assert name == ("DoesNotFitError" if rank == last else "DistributedError")
            assert rank == last or text.startswith(f"rank {last} failed; the window")
    assert_gradient_of_all_rows([result["memory for none"][2] for result in ranks], expected)


def test_memory_that_runs_out_in_a_search_bounds_it_there(ranks):
    expected, _, _ = ddp_cases.expect("samples")
    assert_gradient_of_all_rows([result["memory that runs out"][0] for result in ranks], expected)
    rows = [len(range(*ddp_cases.rows_of(rank, len(ranks)).indices(23))) for rank in range(len(ranks))]
    assert [result["memory that runs out"][1] for result in ranks] == [*rows[:-1], 4]


def test_a_loss_that_fails_while_one_rank_searches_is_told(ranks):
    assert ranks[0]["a loss that fails"] == ("KeyError", "'no such key'")
    for result in ranks[1:]:
        name, text = result["a loss that fails"]
        assert name == "DistributedError" and "KeyError" in text
