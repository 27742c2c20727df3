"""Ranks that are not alike: told by name on all ranks, or right."""

from __future__ import annotations

import pytest
import torch
from distributed import alike_cases
from distributed.ddp_cases import ROWS, gradients, perceptron, regression, regression_batch
from processes import run, worlds
from reference import relative_error


@pytest.fixture(params=worlds(2, 3))
def size(request):
    return request.param


REFUSALS = {
    "sum": "NotDecomposableError",
    "hardest row": "NotDecomposableError",
    "contrastive": "NotDecomposableError",
    "BatchNorm": "BatchNormError",
    "a hook that steps": "HookError",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_one_micro_batch_per_rank_is_not_the_whole_batch(size, name):
    for kind, text in run(alike_cases.whole, size, name, False):
        assert kind == REFUSALS[name] or (kind == "DistributedError" and REFUSALS[name] in text)


def test_batch_norm_names_the_rows_of_all_ranks(size):
    (_, text), *_ = run(alike_cases.whole, size, "BatchNorm", False)
    assert f"would see 4 rows at a time, not the {ROWS} of the batch" in text


@pytest.mark.parametrize("name", ["sum", "BatchNorm", "a hook that steps"])
def test_a_loop_over_windows_of_one_micro_batch_per_rank_is_checked_too(size, name):
    for kind, text in run(alike_cases.whole, size, name, True):
        assert kind == REFUSALS[name] or (kind == "DistributedError" and REFUSALS[name] in text)


@pytest.mark.parametrize("size", worlds(1))
def test_a_group_of_one_process_has_the_whole_batch(size):
    model = perceptron()
    regression(model, regression_batch()).backward()
    (found,) = run(alike_cases.alone, size)
    assert relative_error(found, gradients(model)) < 1e-12


@pytest.mark.parametrize("weight", ["samples", "own"])
@pytest.mark.parametrize("collate", [False, True])
def test_a_rank_without_rows_weighs_nothing(size, weight, collate):
    model = perceptron()
    loss, metrics = alike_cases.with_metric(model, regression_batch())
    loss.backward()
    expected = gradients(model)
    by_rank = run(alike_cases.empty, size, weight, collate)
    for windows in by_rank:
        for found, own_loss, error, _ in windows:
            assert relative_error(found, expected) < 1e-12
            torch.testing.assert_close((own_loss, error), (loss.detach(), metrics["error"].detach()))
    assert by_rank[-1][1][3] == 0


@pytest.mark.parametrize("is_two_phase", [False, True])
def test_a_rank_without_rows_is_refused_where_rows_depend_on_those_of_others(size, is_two_phase):
    *others, (kind, _) = run(alike_cases.empty_where_rows_depend, size, is_two_phase)
    assert kind == "EmptyBatchError"
    for kind, text in others:
        assert kind == "DistributedError" and "EmptyBatchError: the batch has no rows" in text


@pytest.mark.parametrize("name", alike_cases.DIFFERING)
def test_what_differs_between_ranks_is_named_on_all(size, name):
    named = alike_cases.DIFFERING[name][2]
    model = perceptron()
    regression(model, regression_batch()).backward()
    for found, following in run(alike_cases.differing, size, name):
        if named is None:
            assert relative_error(found, gradients(model)) < 1e-12
        else:
            kind, text = found
            assert kind == "DistributedError" and named in text, text
        assert relative_error(following, gradients(model)) < 1e-12


def test_layers_of_other_names_are_told(size):
    for kind, text in run(alike_cases.other_layers, size, "other"):
        assert kind == "DistributedError"
        assert "other.module.weight (1, 3) on rank 0, second.module.weight (1, 3) on rank 1" in text
    for found in run(alike_cases.other_layers, size, "same"):
        assert isinstance(found, dict)


@pytest.mark.parametrize("how", ["error", "break"])
def test_a_loop_that_is_left_on_one_rank_is_told_to_the_others(size, how):
    *others, (kind, text) = run(alike_cases.left_loop, size, how)
    assert (kind, text) == ("ZeroDivisionError", "in the loop") if how == "error" else kind == "WindowError"
    for kind, text in others:
        assert kind == "DistributedError"
        assert f"rank {size - 1} failed" in text and "Its loop over the window was left before its end" in text


def test_a_train_step_counts_the_rows_of_all_ranks(size):
    assert run(alike_cases.counted, size) == [sum(2 + rank for rank in range(size)) + 5] * size


@pytest.mark.parametrize("in_loop", [False, True])
def test_ranks_with_other_numbers_of_windows_are_told_on_all(size, in_loop):
    num_windows = [3] * (size - 1) + [2]
    for rank, (done, kind, text, has_gradients) in enumerate(
        run(alike_cases.uneven_windows, size, num_windows, in_loop)
    ):
        assert kind == "DistributedError" and f"rank {size - 1} has no more windows" in text, (rank, text)
        assert done == 2 and has_gradients  # of the second window


@pytest.mark.parametrize("in_loop", [False, True])
def test_ranks_with_as_many_windows_go_on(size, in_loop):
    assert run(alike_cases.uneven_windows, size, [2] * size, in_loop) == [(4, "ended", "", True)] * size


def test_names_that_come_late_or_go_are_those_of_all_ranks(size):
    model = perceptron()
    loss = regression(model, regression_batch())
    loss.backward()
    once = gradients(model)
    for found, kind, text in run(alike_cases.late_names, size):
        assert (kind, text) == ("ended", "")
        for number, (own, names) in enumerate(found):
            assert names == (["late", "one", "two"] if number == 1 else ["one", "two"])
            if number != 3:  # in which the terms are means over other rows
                assert relative_error(own, {name: 3 * one for name, one in once.items()}) < 1e-12


def test_counter_based_dropout_on_some_ranks_is_told(size):
    for kind, text in run(alike_cases.dropping, size):
        assert kind == "DistributedError" and "counter-based dropout is in the model of rank 0 or of rank" in text
