"""Plans for models whose parameters are sharded over processes, against what their ranks take."""

from __future__ import annotations

import pytest
from distributed import plan_cases
from processes import run

ON_TWO = tuple(plan_cases.CASES)


def checked(results):
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.fixture(scope="module")
def on_two():
    return checked(run(plan_cases.run_cases, 2, ON_TWO, timeout_s=180))[0]


@pytest.mark.parametrize("name", ON_TWO)
def test_the_peak_is_predicted(on_two, name):
    predictions, real = on_two[name]
    compare(predictions, real)


def test_the_peak_of_shards_that_are_replicated_is_predicted():
    predictions, real = checked(run(plan_cases.run_cases, 4, ["layers"]))[0]["layers"]
    compare(predictions, real)


def compare(predictions, real):
    assert predictions and real.keys() == set(plan_cases.SIZES)
    for size, phases in real.items():
        assert phases.keys() == {"forward and backward", "update"}
        for phase, num_bytes in phases.items():
            for predicted in predictions:
                assert predicted[size][phase] == pytest.approx(num_bytes, rel=1e-3)


@pytest.fixture(scope="module")
def proposals():
    return checked(run(plan_cases.levers, 2, ["layers", "layers, reduced once"], timeout_s=180))[0]


def test_reducing_once_costs_rows(proposals):
    choice, levers = proposals["layers"]
    assert 512 <= choice < 1024
    assert 0 < levers["reduce once"] < choice
    assert levers["checkpoint layers"] > choice


def test_reducing_every_time_saves_rows(proposals):
    choice, levers = proposals["layers, reduced once"]
    assert levers["reduce every time"] > choice
    # Rows are cheap in this model, and whole gradients dear: the same budget in both.
    assert "reduce once" not in levers


def test_a_model_that_no_rank_can_run_alone_is_refused():
    for kind, message in checked(run(plan_cases.refused, 2)):
        assert kind == "ModelError" and "sharded" in message
