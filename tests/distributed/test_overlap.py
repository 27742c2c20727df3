"""Gradients that are summed while the last backward pass runs: equal, and what is given up for it."""

from __future__ import annotations

import pytest
from distributed import overlap_cases
from distributed.ddp_cases import gradients, perceptron, regression, regression_batch
from processes import run, worlds
from reference import relative_error
from torch import nn

import gradfold


@pytest.fixture(scope="module", params=worlds(2, 3))
def ranks(request):
    return run(overlap_cases.scenes, request.param)


def expect(loss_fn=regression):
    model = perceptron()
    loss = loss_fn(model, regression_batch())
    loss.backward()
    return gradients(model), loss.detach()


@pytest.mark.parametrize("name", ["uneven", "one micro-batch", "weighed"])
def test_the_gradient_is_that_of_all_rows(ranks, name):
    expected, loss = expect(overlap_cases.by_target if name == "weighed" else regression)
    for scenes in ranks:
        for found, own_loss in scenes[name]:
            assert relative_error(found, expected) < 1e-12
            assert abs(own_loss - loss) < 1e-12


def test_two_modules(ranks):
    first = ranks[0]["two modules"][0][0]  # the first window is summed at its end
    for scenes in ranks:
        for found, _ in scenes["two modules"]:
            assert relative_error(found, first) < 1e-12


def test_parameters_that_the_last_micro_batch_does_not_use_are_summed(ranks):
    expected = overlap_cases.expect_two_paths(len(ranks))
    for scenes in ranks:
        for found in scenes["unused, found"]:
            assert relative_error(found, expected) < 1e-12


def test_a_window_in_which_a_rank_has_no_rows_is_summed_at_its_end(ranks):
    expected, _ = expect()
    for scenes in ranks:
        for found in scenes["without rows"]:
            assert relative_error(found, expected) < 1e-12


def test_gradients_that_were_there_are_added_to(ranks):
    expected, _ = expect()
    for scenes in ranks:
        found, are_same = scenes["added"]
        assert are_same and relative_error(found, {name: 2 * one for name, one in expected.items()}) < 1e-12


@pytest.mark.parametrize("policy", ["raise", "skip_update"])
def test_gradients_that_are_not_finite(ranks, policy):
    expected, _ = expect()
    for scenes in ranks:
        first, second, third = scenes[policy]
        if policy == "raise":
            assert second == "NonFiniteLossError"
        else:
            assert all(one is None for one in second.values())
        assert relative_error(first, expected) < 1e-12 and relative_error(third, expected) < 1e-12


@pytest.mark.parametrize(
    "name",
    [
        "an error of all in an early forward pass",
        "an error of one in an early forward pass",
        "an error of all in the last backward pass",
    ],
)
def test_an_error_is_rolled_back_on_all_ranks(ranks, name):
    expected, _ = expect()
    for rank, scenes in enumerate(ranks):
        (first, _, _), (second, text, left), (third, _, found) = scenes[name]
        is_told = "of one" in name and rank > 0
        assert (first, second, third) == ("right", "DistributedError" if is_told else "ValueError", "right")
        assert "injected" in text and not any(one is not None for one in left)
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("size", worlds(2, 3))
def test_an_error_of_one_rank_in_the_last_backward_pass_ends_the_training_on_all(size):
    outcomes = run(overlap_cases.faults, size, "the last backward pass", "one")
    for rank, (first, (second, text, left), third) in enumerate(outcomes):
        assert first[0] == "right" and second == ("DistributedError" if rank else "ValueError")
        assert "injected" in text and not any(one is not None for one in left)
        assert third[0] == "DistributedError"


@pytest.mark.parametrize("size", worlds(2))
def test_parameters_without_a_gradient_in_the_last_micro_batch_are_told(size):
    """DistributedDataParallel would leave each rank its own gradient."""
    for first, (kind, text, left) in run(overlap_cases.unused, size, False):
        assert isinstance(first, dict)
        assert kind == "DistributedError" and "find_unused_parameters=True" in text
        assert not any(one is not None for one in left)


def test_what_is_not_supported_is_refused(ranks):
    for scenes in ranks:
        views, small, skipped, exact = scenes["refused"]
        assert "gradient_as_bucket_view" in views
        assert "DistributedDataParallel sums the gradients of parameters in a small dtype" in small
        assert 'on_non_finite="skip_micro_batch"' in skipped and 'batch_norm="exact"' in exact


def test_an_option_that_does_not_exist():
    with pytest.raises(gradfold.OptionError, match="in_last_backward"):
        gradfold.Accumulator(nn.Linear(1, 1), regression, ddp_reduce="always")
