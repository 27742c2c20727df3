"""Several processes under DistributedDataParallel: the gradient of all their rows, the same bits on each."""

from __future__ import annotations

import copy

import pytest
import torch
from distributed import ddp_cases, scenarios
from processes import run, worlds
from reference import relative_error

import gradfold

SMOKE = ("samples", "tokens, shared, frozen, rare and unused parameters")


@pytest.fixture(scope="module", params=worlds(1, 3))
def ranks(request):
    return run(ddp_cases.run_cases, request.param, tuple(ddp_cases.CASES))


@pytest.fixture(scope="module", params=worlds(2, 4))
def smoke(request):
    return run(ddp_cases.run_cases, request.param, SMOKE)


@pytest.mark.parametrize("name", ddp_cases.CASES)
def test_the_gradient_is_that_of_all_rows(ranks, name):
    assert_gradient_of_all_rows(ranks, name)


@pytest.mark.parametrize("name", SMOKE)
def test_other_numbers_of_ranks(smoke, name):
    assert_gradient_of_all_rows(smoke, name)


def assert_gradient_of_all_rows(ranks, name):
    expected, loss, metrics = ddp_cases.expect(name)
    for result in ranks:
        found = result[name]["gradients"]
        assert {key for key, one in found.items() if one is None} == {
            key for key, one in expected.items() if one is None
        }
        assert (
            relative_error(
                {key: one for key, one in found.items() if one is not None},
                {key: one for key, one in expected.items() if one is not None},
            )
            < 1e-12
        )
        torch.testing.assert_close(result[name]["loss"], loss, rtol=1e-12, atol=1e-12)
        for key, value in metrics.items():
            if value.dim() == 0:
                torch.testing.assert_close(result[name]["metrics"][key], value, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("name", ddp_cases.CASES)
def test_every_rank_has_the_same_bits(ranks, name):
    first = ranks[0][name]
    for result in ranks[1:]:
        for key, one in result[name]["gradients"].items():
            assert (one is None and first["gradients"][key] is None) or torch.equal(one, first["gradients"][key])
        assert torch.equal(result[name]["loss"], first["loss"])
        assert result[name]["weight"] == first["weight"]


@pytest.fixture(scope="module", params=worlds(3))
def scenes(request):
    return run(scenarios.run_scenarios, request.param)


def assert_same_everywhere(values, expected):
    for value in values:
        assert relative_error(present(value), present(expected)) < 1e-12
        assert value.keys() == expected.keys()
        assert all(one is None or torch.equal(one, values[0][key]) for key, one in value.items())


def present(gradient):
    return {key: one for key, one in gradient.items() if one is not None}


def test_a_loop_body_as_it_was_with_windows_of_unequal_length(scenes):
    expected, loss, _ = ddp_cases.expect("tokens, shared, frozen, rare and unused parameters")
    assert_same_everywhere([scene["loop window"][0] for scene in scenes], expected)
    for scene in scenes:
        torch.testing.assert_close(scene["loop window"][1], loss, rtol=1e-12, atol=0)


def test_two_wrapped_modules_in_one_model(scenes):
    assert_same_everywhere([scene["two modules"] for scene in scenes], scenarios.two_modules_alone())


def test_gradients_are_reduced_once_per_window_and_bucket(scenes):
    assert all(scene["reductions"] == [1] for scene in scenes)


def test_training_ends_where_one_process_ends(scenes):
    assert_same_everywhere([scene["train"] for scene in scenes], scenarios.train_alone())


def test_windows_start_from_the_buffers_of_rank_0(scenes):
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm1d(3).double()
    layer(scenarios.numbers(8, 3, seed=0))
    for rank, scene in enumerate(scenes):
        again = copy.deepcopy(layer)
        again(scenarios.numbers(8, 3, seed=rank))
        torch.testing.assert_close(scene["buffers"][0], again.running_mean, rtol=1e-12, atol=1e-12)
        assert scene["buffers"][1] == 2


def test_memory_that_runs_out_on_one_rank_is_recovered_there(scenes):
    expected, _, _ = ddp_cases.expect("samples")
    assert_same_everywhere([scene["out of memory"][0] for scene in scenes], expected)
    assert [scene["out of memory"][1] > 0 for scene in scenes] == [False] * (len(scenes) - 1) + [True]


def test_a_gradient_that_is_not_finite_is_named_on_every_rank(scenes):
    assert all(scene["not finite, raise"][0] == "NonFiniteGradientError" for scene in scenes)
    last = len(scenes) - 1
    for scene in scenes[:-1]:
        assert scene["not finite, raise"][1] == f"rank {last}: {scenes[-1]['not finite, raise'][1]}"


def test_an_update_is_skipped_on_every_rank(scenes):
    for scene in scenes:
        found, is_skipped, *_ = scene["not finite, skip_update"]
        assert is_skipped and all(one is None for one in found.values())


def test_a_micro_batch_of_one_rank_is_left_out_of_the_denominator_of_all(scenes):
    expected = scenarios.all_but_the_last_row()
    assert_same_everywhere([scene["not finite, skip_micro_batch"][0] for scene in scenes], expected)
    assert all(scene["not finite, skip_micro_batch"][2] == ddp_cases.ROWS - 1 for scene in scenes)
    assert [len(scene["not finite, skip_micro_batch"][3]) for scene in scenes] == [0] * (len(scenes) - 1) + [1]


@pytest.mark.parametrize(
    ("set_up", "text"),
    [
        ("unwrapped", "no DistributedDataParallel is found"),
        ("static graph", "static_graph=True"),
        ("hook", "communication hook"),
        ("deepspeed", "DeepSpeed"),
        ("groups", "different process groups"),
        ("sync batch norm", "SyncBatchNorm normalizes"),
    ],
)
def test_what_cannot_work_is_refused(scenes, set_up, text):
    for scene in scenes:
        name, message = scene["refusals"][set_up]
        assert name == "DistributedError" and text in message


def test_a_process_may_train_by_itself(scenes):
    assert all(isinstance(scene["refusals"]["alone"], gradfold.WindowResult) for scene in scenes)


def test_an_error_on_one_rank_is_told_to_the_others_and_the_next_window_is_fine(scenes):
    expected, _, _ = ddp_cases.expect("samples")
    (name, text), _ = scenes[0]["bad batch"]
    assert name == "BatchError"
    for scene in scenes[1:]:
        assert scene["bad batch"][0] == (
            "DistributedError",
            f"rank 0 failed; the window was rolled back on all ranks. BatchError: {text}",
        )
    assert_same_everywhere([scene["bad batch"][1] for scene in scenes], expected)


@pytest.mark.parametrize("what", ["frozen", "gradient found"])
def test_parameters_that_do_not_stand_alike_are_refused_on_all_ranks(scenes, what):
    for scene in scenes:
        name, text = scene[f"{what} on one rank"]
        assert name == "DistributedError" and "on some ranks and not on others" in text


def test_a_rank_may_lose_all_its_micro_batches(scenes):
    expected = scenarios.rows_of_all_but_the_last_rank(len(scenes))
    assert_same_everywhere([scene["nothing left on one rank"][0] for scene in scenes], expected)
    assert len({scene["nothing left on one rank"][1] for scene in scenes}) == 1


def test_metrics_count_the_rows_of_a_rank_that_weighs_nothing(scenes):
    for scene in scenes:
        weight, mean = scene["no weight on one rank"]
        assert set(weight) == {"a"}
        assert mean == pytest.approx(scenarios.mean_output(), rel=1e-9)


def test_what_fails_before_the_loop_over_a_window_is_told(scenes):
    assert scenes[0]["refused on one rank"][0] == "KeyError"
    assert all(scene["refused on one rank"][0] == "DistributedError" for scene in scenes[1:])
