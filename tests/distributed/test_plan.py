"""Plans for models whose parameters are sharded over processes, against what their ranks take."""

from __future__ import annotations

import pytest
from distributed import plan_cases
from processes import run, worlds

ON_TWO = tuple(plan_cases.CASES)


@pytest.fixture(scope="module", params=worlds(2))
def on_two(request):
    return run(plan_cases.run_cases, request.param, ON_TWO, timeout_s=180)[0]


@pytest.mark.parametrize("name", ON_TWO)
def test_the_peak_is_predicted(on_two, name):
    predictions, real = on_two[name]
    compare(predictions, real)


@pytest.mark.parametrize("size", worlds(4))
def test_the_peak_of_shards_that_are_replicated_is_predicted(size):
    predictions, real = run(plan_cases.run_cases, size, ["layers"])[0]["layers"]
    compare(predictions, real)


MESSAGES = 6 * 256  # bytes of messages between ranks that threads may still hold, which no plan counts


def compare(predictions, real):
    assert predictions and real.keys() == set(plan_cases.SIZES)
    for size, phases in real.items():
        assert phases.keys() == {"forward and backward", "update"}
        for phase, num_bytes in phases.items():
            for predicted in predictions:
                assert predicted[size][phase] == pytest.approx(num_bytes, rel=1e-3, abs=MESSAGES)


@pytest.fixture(scope="module", params=worlds(2))
def proposals(request):
    return run(plan_cases.savings, request.param, ["layers", "layers, reduced once"], timeout_s=180)[0]


def test_reducing_once_costs_rows(proposals):
    choice, savings = proposals["layers"]
    assert 512 <= choice < 1024
    assert 0 < savings["reduce once"] < choice
    assert savings["checkpoint layers"] > choice


def test_reducing_every_time_saves_rows(proposals):
    choice, savings = proposals["layers, reduced once"]
    assert savings["reduce every time"] > choice
    # Rows are cheap in this model, and whole gradients dear: the same budget in both.
    assert "reduce once" not in savings


@pytest.mark.parametrize("size", worlds(2))
def test_a_model_that_no_rank_can_run_alone_is_refused(size):
    for kind, message in run(plan_cases.refused, size):
        assert kind == "ModelError" and "sharded" in message
