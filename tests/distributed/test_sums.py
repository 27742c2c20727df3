"""Losses that add up (weight "sum") on several ranks: gradient, loss and metrics are those of all rows."""

from __future__ import annotations

import pytest
import torch
from distributed import sum_cases
from processes import run, worlds
from reference import relative_error


@pytest.fixture(scope="module", params=worlds(2, 3))
def ranks(request):
    return run(sum_cases.run_all, request.param)


def assert_law(found, loss, expected):
    present, expected_gradient = (
        {name: one for name, one in gradient.items() if one is not None} for gradient in (found, expected[0])
    )
    assert relative_error(present, expected_gradient) < 1e-12
    torch.testing.assert_close(loss, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", ["rows_of", "uneven"])
@pytest.mark.parametrize("kind", ["ddp", "shards"])
@pytest.mark.parametrize("name", sum_cases.CASES)
def test_the_gradient_is_that_of_all_rows(ranks, name, kind, rows):
    expected = sum_cases.expect(name)
    for rank in ranks:
        gradient, loss, metrics, weight = rank[name, kind, rows]
        assert_law(gradient, loss, expected)
        for key, value in expected[2].items():
            torch.testing.assert_close(metrics[key], value, rtol=1e-9, atol=1e-9, check_dtype=False)
        assert weight == 1.0 if name == "a share" else weight["share"] == 1.0


@pytest.mark.parametrize("name", ["loop", "overlapped"])
def test_a_loop_body_and_sums_in_the_last_backward_pass(ranks, name):
    for rank in ranks:
        gradient, loss, weight = rank[name]
        assert_law(gradient, loss, sum_cases.expect("a share"))
        assert weight == 1.0


def test_what_is_left_out_adds_nothing_and_moves_no_denominator(ranks):
    for rank in ranks:
        gradient, loss, weight = rank["left out"]
        assert_law(gradient, loss, sum_cases.expect("a share", slice(0, -1)))
        assert weight == 1.0


def test_a_mean_is_refused_on_all_ranks(ranks):
    kinds, texts = zip(*(rank["refused"] for rank in ranks), strict=True)
    assert set(kinds) <= {"NotDecomposableError", "DistributedError"} and "NotDecomposableError" in kinds
    assert all('weight="samples"' in text and "is a mean over the rows" in text for text in texts)
