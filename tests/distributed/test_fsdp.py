"""Parameters sharded over processes (fully_shard): the gradient of all their rows."""

from __future__ import annotations

import pytest
import torch
from distributed import ddp_cases, fsdp_cases
from processes import run, worlds
from reference import relative_error


def present(gradient):
    return {name: one for name, one in gradient.items() if one is not None}


@pytest.fixture(
    scope="module",
    params=worlds(
        (1, "per_micro_batch"), (3, "per_micro_batch"), (3, "per_window"), (4, "per_micro_batch"), (4, "per_window")
    ),
)
def ranks(request):
    size, option = request.param
    return run(fsdp_cases.run_cases, size, option)


@pytest.mark.parametrize("name", fsdp_cases.CASES)
def test_the_gradient_is_that_of_all_rows(ranks, name):
    expected, loss, metrics = fsdp_cases.expect(name)
    for rank in ranks:
        gradient, found, found_metrics = rank[name]
        assert gradient.keys() == expected.keys()
        assert relative_error(present(gradient), present(expected)) < 1e-12
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=1e-12)
        for key, value in found_metrics.items():
            if key in metrics:
                torch.testing.assert_close(value, metrics[key], rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.fixture(scope="module", params=worlds(3))
def scenes(request):
    return run(fsdp_cases.scenarios, request.param)


def test_training_ends_where_one_process_ends(scenes):
    for scene in scenes:
        expected = train_without_schedule()
        assert relative_error(scene["trained"], expected) < 1e-12
        assert scene["grad_norm"].item() > 0.1


def train_without_schedule():
    model = ddp_cases.perceptron()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        ddp_cases.regression(model, ddp_cases.regression_batch()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return {name: one.detach() for name, one in model.named_parameters()}


def test_gradients_found_are_added_to(scenes):
    expected, _, _ = fsdp_cases.expect("samples")
    for scene in scenes:
        assert relative_error(scene["found"], {name: 2 * one for name, one in expected.items()}) < 1e-12


def test_an_evaluation_before_makes_no_difference(scenes):
    expected, _, _ = fsdp_cases.expect("samples")
    for scene in scenes:
        assert relative_error(scene["evaluated"], {name: 2 * one for name, one in expected.items()}) < 1e-12


def test_parameters_that_nobody_sums_are_refused(scenes):
    for kind, message in (scene["ignored"] for scene in scenes):
        assert kind == "DistributedError" and "Linear.bias" in message and "ignored_params" in message


def test_what_is_not_finite_on_one_rank_is_refused_on_all(scenes):
    assert all(scene["refused"][0] in ("NonFiniteLossError", "NonFiniteGradientError") for scene in scenes)
    assert all(scene["skipped"] == (True, [True] * 4) for scene in scenes)


def test_mixed_precision_of_fully_shard(scenes):
    expected, _, _ = fsdp_cases.expect("samples")
    for scene in scenes:
        found = {name: one.double() for name, one in scene["mixed"].items()}
        assert 0 < relative_error(found, expected) < 0.02


def test_leaving_micro_batches_out_is_refused(scenes):
    assert all(scene["left out"][0] == "OptionError" for scene in scenes)


def test_an_error_before_the_first_forward_is_told(scenes):
    assert scenes[0]["bad batch"][0] == "BatchError"
    for scene in scenes[1:]:
        assert scene["bad batch"][0] == "DistributedError" and "BatchError" in scene["bad batch"][1]
