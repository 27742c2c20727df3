"""Two-phase losses on several ranks: loss and gradient of all their rows, the loss's own parameters counted once."""

from __future__ import annotations

import pytest
import torch
from distributed import two_phase_ranks as ranks
from processes import run, worlds
from reference import relative_error


@pytest.fixture(scope="module", params=worlds(1, 3))
def results(request):
    return run(ranks.run_all, request.param)


CASES = {
    "info_nce": (ranks.INFO_NCE, 0.0),
    "whole": (ranks.INFO_NCE, 0.0),
    "covariance": (ranks.COVARIANCE, 0.0),
    "dropout": (ranks.INFO_NCE, 0.3),
    "out of memory": (ranks.INFO_NCE, 0.3),
    "dropped": (lambda model, batch: model(batch)[0].square().mean(), 0.4),
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_all_rows_on_every_rank(results, name):
    expected, loss = ranks.expect(*CASES[name])
    for result in results:
        gradient, found, _, _ = result[name]
        gradient = {key: one for key, one in gradient.items() if key in expected or bool(one.any())}
        assert relative_error(gradient, expected) < 1e-12
        torch.testing.assert_close(found, loss, rtol=1e-12, atol=0)
        assert all(torch.equal(one, results[0][name][0][key]) for key, one in result[name][0].items())


def test_the_temperature_counts_once(results):
    expected, _ = ranks.expect(ranks.INFO_NCE)
    for result in results:
        torch.testing.assert_close(result["info_nce"][0]["log_scale"], expected["log_scale"], rtol=1e-12, atol=0)


def test_metrics_are_those_of_the_batch_and_rows_of_each_rank(results):
    rows = ranks.towers()(ranks.batch())[0].sum(1)
    torch.testing.assert_close(torch.cat([result["info_nce"][2]["rows"] for result in results]), rows.detach())
    for result in results:
        assert float(result["info_nce"][2]["share"]) == pytest.approx(11 / 17)


def test_memory_that_runs_out_after_statistics_were_sent_is_survived_by_all(results):
    assert results[-1]["out of memory"][3]
    assert all(not result["out of memory"][3] for result in results[:-1])


@pytest.mark.parametrize("when", ["sweep", "loss", "replay"])
def test_a_rank_that_fails_ends_the_window_on_all_and_the_next_is_right(results, when):
    expected, _ = ranks.expect(ranks.INFO_NCE)
    for rank, result in enumerate(results):
        error, left, after = result[when]
        assert error[0] == ("KeyError" if rank == 0 else "DistributedError") and when in error[1]
        assert not left
        assert relative_error(after, expected) < 1e-12


def test_statistics_that_do_not_go_together_are_refused_on_all(results):
    if len(results) > 1:
        for result in results:
            assert result["unlike"][0] == "LossError" and "of rank 1" in result["unlike"][1]
