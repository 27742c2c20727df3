"""Exact BatchNorm on several ranks: the statistics of all rows, and no rank that waits for one that has failed."""

from __future__ import annotations

import pytest
import torch
from distributed import lockstep_cases
from processes import run, worlds
from reference import relative_error


@pytest.fixture(scope="module", params=worlds(2))
def ranks(request):
    return run(lockstep_cases.run, request.param)


def assert_exact(of_ranks):
    expected, buffers = lockstep_cases.alone()
    for found, found_buffers, _, mean in of_ranks:
        assert relative_error(found, expected) < 1e-12
        for name, one in buffers.items():
            torch.testing.assert_close(found_buffers[name], one, rtol=1e-12, atol=1e-12)
        for name, one in found.items():
            assert torch.equal(one, of_ranks[0][0][name])
        torch.testing.assert_close(mean, of_ranks[0][3])


@pytest.mark.parametrize("name", ["micro-batches", "one micro-batch each"])
def test_gradients_and_running_statistics_are_those_of_all_rows(ranks, name):
    of_ranks = [result[name] for result in ranks]
    assert_exact(of_ranks)
    counts = [one[2] for one in of_ranks]
    assert counts == [1] * len(ranks) if name == "one micro-batch each" else counts[0] > counts[-1]


def test_frozen_layers_have_no_graph_and_joint_calls_without_grad_break_no_chain(ranks):
    expected, buffers, _ = lockstep_cases.frozen(lockstep_cases.Branching(), lockstep_cases.batch())
    for result in ranks:
        found, found_buffers, seen = result["a frozen stem and a teacher"]
        present = {name: one for name, one in expected.items() if one is not None}
        assert relative_error({name: found[name] for name in present}, present) < 1e-12
        for name, one in buffers.items():
            torch.testing.assert_close(found_buffers[name], one, rtol=1e-12, atol=1e-12)
        assert not any(seen)


def test_prototypes_count_once_on_all_ranks_together(ranks):
    expected, buffers = lockstep_cases.prototypes(lockstep_cases.Prototypes(), lockstep_cases.batch()[0])
    for result in ranks:
        found, found_buffers = result["prototypes"]
        assert relative_error(found, expected) < 1e-12
        for name, one in buffers.items():
            torch.testing.assert_close(found_buffers[name], one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", worlds(3))
def test_three_ranks(size):
    for of_ranks in zip(*run(lockstep_cases.windows, size), strict=True):
        assert_exact(of_ranks)


def test_autocast(ranks):
    assert all(bool(result["bfloat16"].isfinite()) for result in ranks)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("an error in a forward pass", "the second micro-batch"),
        ("an error in the stem's backward pass", "in the backward pass"),
        ("an error between joint calls of the backward pass", "in the backward pass"),
        ("an error before the first forward pass", "rows"),
        ("out of memory", "too many rows"),
        ("out of memory in the middle of forward passes", "too many rows"),
        ("out of memory in the backward pass", "too many rows"),
        ("an error of the guard", "is a sum over the rows"),
    ],
)
def test_an_error_on_one_rank_ends_the_window_on_all(ranks, name, text):
    *others, last = [result[name] for result in ranks]
    assert text in last[0][1]
    for (kind, message), is_as_before, _ in others:
        assert kind == "DistributedError" and f"rank {len(ranks) - 1} failed; the window" in message and text in message
        assert is_as_before
    assert last[1]
    assert_exact([result[name][2] for result in ranks])


@pytest.mark.parametrize("where", ["", " in the middle of forward passes", " in the backward pass"])
def test_memory_that_runs_out_is_named_on_all_ranks_with_what_to_write(ranks, where):
    *others, last = [result[f"out of memory{where}"][0] for result in ranks]
    assert last[0] == "DoesNotFitError"
    for _, message in (last, *others):
        if "middle" in where:
            assert "out of memory with 1 row at once" in message and "a single one cannot begin again" in message
        else:
            assert "out of memory with 2 rows at once (rows 0 to 1)" in message
            assert "Write a smaller micro_batch_size on all of them (1 or less)" in message


@pytest.mark.parametrize("name", ["other ways", "other channels"])
def test_ranks_that_take_different_ways_are_told(ranks, name):
    for result in ranks:
        kind, message = result[name]
        assert kind == "BatchNormError" and "their forward passes diverge" in message


def test_a_gradient_that_is_not_finite(ranks):
    assert {result["not finite"][0] for result in ranks} == {"NonFiniteLossError"}
