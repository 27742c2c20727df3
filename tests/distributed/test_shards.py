"""Sharded parameters: loss terms without weight on some ranks, faults on all of them, and what is said of the rest."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from distributed import shard_cases
from processes import run, worlds
from reference import relative_error


@pytest.fixture(scope="module", params=worlds(2, 3, 4))
def ranks(request):
    """The results of all scenes, by rank."""
    return run(shard_cases.scenes, request.param, timeout_s=120)


@pytest.mark.parametrize("case", shard_cases.HEADS, ids=str)
def test_a_term_without_weight_on_some_ranks(ranks, case):
    """One head's gradient was added to the other's (84 % off), or ranks waited for each other for ever."""
    *_, sizes = case
    expected, loss = shard_cases.expect(sizes)
    for scenes in ranks:
        gradients, found = scenes["heads"][case]
        assert relative_error(gradients, expected) < 1e-12
        torch.testing.assert_close(found, loss)


@pytest.mark.parametrize("case", shard_cases.FAULTS, ids=str)
def test_an_error_on_all_ranks_is_rolled_back(ranks, case):
    """The next window was 28 to 73 % off."""
    expected = shard_cases.expect_both()
    for scenes in ranks:
        for point, (ended, is_as_before, gradients) in zip(shard_cases.CALLS, scenes["calls"][case], strict=True):
            assert (ended, is_as_before) == ("failed", True), point
            assert relative_error(gradients, expected) < 1e-12, point


@pytest.mark.parametrize("size", worlds(2, 3, 4))
@pytest.mark.parametrize(
    "points", [shard_cases.POINTS[::8], pytest.param(shard_cases.POINTS, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_memory_that_runs_out_at_some_operator_on_all_ranks_is_rolled_back(size, points):
    """Also where modules stay gathered after a backward pass."""
    expected = shard_cases.expect_both()
    for scenes in run(shard_cases.sweep, size, points, timeout_s=120):
        for case, outcomes in scenes.items():
            assert sum(ended == "failed" for ended, *_ in outcomes) > len(outcomes) / 2
            for point, (ended, is_as_before, gradients) in zip(points, outcomes, strict=True):
                assert ended == "right" or is_as_before, (case, point)
                assert relative_error(gradients, expected) < 1e-12, (case, point)


@pytest.mark.parametrize("policy", ["raise", "skip_update"])
def test_shards_hold_no_gradient_that_is_not_finite(ranks, policy):
    """Where modules stay gathered it stood in the shards, which nobody looked at."""
    expected = list(shard_cases.expect_both().values())
    for scenes in ranks:
        ended, are_empty, gradients = scenes["not finite"][policy]
        assert ended == ("skipped" if policy == "skip_update" else "NonFiniteLossError")
        assert all(are_empty)
        for found, reference in zip(gradients, expected, strict=True):
            assert relative_error({"": found}, {"": reference}) < 1e-12


def test_what_is_not_looked_at_is_said_once_and_what_is_inexact_refused(ranks):
    for scenes in ranks:
        first, second, refusal = scenes["said"]
        assert len(first) == 1 and "the self-check does not run under fully_shard" in first[0]
        assert second == []
        assert "off by 1 % in bfloat16" in refusal and "reduce_dtype=torch.float32" in refusal


def test_a_default_dtype_of_float64(ranks):
    for scenes in ranks:
        assert relative_error(scenes["in double"], shard_cases.expect_both()) < 1e-12


NUMBERS = count()  # torch keeps meshes by name, and groups that were severed with them


def check_alone(size, reduce, point):
    """A fault on one rank ends the window on all, and either the training on all or nothing."""
    outcomes = run(shard_cases.failing_alone, size, reduce, point, next(NUMBERS))
    if outcomes[0][0][0] == ("right", ""):  # there is no such operator, or it was survived
        assert all(kind == "right" for found, _ in outcomes for kind, _ in found), outcomes
        windows = (1, 2)
    else:
        assert [found[0][0] == "DistributedError" for found, _ in outcomes] == [rank > 0 for rank in range(size)]
        for found, _ in outcomes[1:]:
            assert "injected" in found[0][1] and "rank 0" in found[0][1], found
        after = {found[1][0] for found, _ in outcomes}
        assert after in ({"right"}, {"DistributedError"}), outcomes
        windows = (0, 1 if after == {"right"} else 0)
    for _, num_added in outcomes:
        for found, expected in zip(num_added, windows, strict=True):
            torch.testing.assert_close(found, torch.full_like(found, expected), rtol=0, atol=1e-9)
    return outcomes[0][0]


@pytest.mark.parametrize("size", worlds(2, 3, 4))
@pytest.mark.parametrize("point", ["forward", "backward", 101])
def test_an_error_on_one_rank_in_the_middle_of_a_turn_ends_the_training_on_all(size, point):
    """The others waited for ever."""
    _, (kind, _) = check_alone(size, "per_micro_batch", point)
    assert kind == "DistributedError"


@pytest.mark.slow
@pytest.mark.parametrize("size", worlds(2, 3, 4))
@pytest.mark.parametrize("reduce", ["per_micro_batch", "per_window"])
def test_memory_that_runs_out_on_one_rank_at_every_tenth_operator(size, reduce):
    ended = [check_alone(size, reduce, point) for point in shard_cases.POINTS]
    assert sum(kind != "right" for (kind, _), _ in ended) > len(ended) / 2
