"""`gradfold compare` and `gradfold verify` on several ranks: the arms, and the commands as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from distributed import compare_cases
from distributed.compare_cases import GLOBAL_BATCH, MICRO_BATCH, ON_ALL, ROWS
from processes import run, worlds
from reference import relative_error

from gradfold.cli.options import launch_ranks, without_nproc
from gradfold.compare.data import split_epoch_for_rank, split_for_rank
from gradfold.errors import OptionError

WORKLOAD = f"{compare_cases.__file__}:workload"
ILL = f"{compare_cases.__file__}:ill_on_rank_1"


def program(*arguments, before=("-m", "gradfold")):
    return subprocess.run([sys.executable, *before, *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def full_batch():
    torch.set_num_threads(1)
    return compare_cases.train("full-batch", None)


@pytest.mark.parametrize("size", worlds(2))
def test_arms_that_share_a_global_batch(size, full_batch):
    results = run(compare_cases.train_arms, size)
    reference, expected = full_batch
    for arm in ON_ALL:
        measured, left = results[0][arm]
        for other in results[1:]:  # every rank holds the same weights and saw the same losses
            assert other[arm][0].curve == measured.curve
            for name, tensors in left.items():
                torch.testing.assert_close(other[arm][1][name], tensors, rtol=0, atol=0)
        assert measured.num_samples == 2 * ROWS
    ours, left = results[0]["gradfold"]
    assert ours.num_updates == reference.num_updates == 6
    assert ours.curve.samples == reference.curve.samples
    assert ours.curve.loss == pytest.approx(reference.curve.loss, rel=1e-5)
    for name in ("gradient_float64", "last_window_float64"):
        assert relative_error(left[name], expected[name]) < 1e-12
    # What an article's loop has there: a mean of means, over ranks and micro-batches.
    gradient = mean_of_means(size)
    assert relative_error(results[0]["plain-loop"][1]["gradient_float64"], gradient) < 1e-12
    assert relative_error(gradient, expected["gradient_float64"]) > 0.05


def mean_of_means(size):
    """The first gradient of the plain loop, with none of its code."""
    torch.manual_seed(0)
    model, data = compare_cases.network().double(), compare_cases.workload().train_data
    num_micro_batches = max(1, GLOBAL_BATCH // (MICRO_BATCH * size))
    rows_of_a_rank = -(-GLOBAL_BATCH // size)
    starts = [rank * rows_of_a_rank for rank in range(size)]  # 8 rows: 4 + 4, or 3 + 3 + 2 with the first row again
    for start in starts:
        for number in range(num_micro_batches):
            first = start + number * MICRO_BATCH
            batch = {key: one[first : first + MICRO_BATCH].double() for key, one in data.items()}
            (compare_cases.mean_of_counted(model, batch) / num_micro_batches / size).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("rows", "size"), [(22, 2), (22, 3), (17, 4), (8, 1), (9, 4)])
def test_shares_of_an_epoch_are_alike_in_length_and_miss_nothing(rows, size):
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    own = [split_epoch_for_rank(order, GLOBAL_BATCH, rank, size) for rank in range(size)]
    assert len({len(indices) for indices, _ in own}) == 1
    assert sum(num for _, num in own) == rows
    assert set(torch.cat([indices for indices, _ in own]).tolist()) == set(range(rows))
    assert torch.equal(torch.cat([split_for_rank(order, rank, size) for rank in range(size)]), order)


@pytest.mark.slow
def test_compare_starts_its_ranks_itself(tmp_path):
    arms = ["--arms", "full-batch,gradfold"]
    ended = program("compare", WORKLOAD, *arms, "--nproc", "2", "--json", "--out", str(tmp_path / "out"))
    assert (ended.returncode, ended.stderr) == (0, "")
    results = json.loads(ended.stdout)  # one object: rank 0 alone prints
    assert results["sizes"]["num_ranks"] == 2 and results["settings"]["num_ranks"] == 2
    rows = {row["arm"]: row for row in results["rows"]}
    deviation = rows["gradfold"]["deviations"]
    assert deviation["gradient_float64"]["value"] < 1e-12 and deviation["last_window_float64"]["value"] < 1e-12
    assert "on each of 2 processes" in (tmp_path / "out" / "report.html").read_text("utf-8")


@pytest.mark.slow
def test_compare_says_which_rank_has_failed_and_exits_with_1():
    ended = program("compare", ILL, "--arms", "full-batch,plain-loop", "--nproc", "2")
    assert ended.returncode == 1 and ended.stderr == ""
    assert "on rank 1: LookupError: rank one is ill" in ended.stdout


@pytest.mark.slow
def test_compare_under_torchrun_speaks_once():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gradfold")
    ended = program("compare", WORKLOAD, "--arms", "gradfold", before=torchrun)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Distance from the full batch") == 1


def test_nproc_under_torchrun_is_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match="Leave --nproc out"):
        launch_ranks(2)


def test_the_program_that_ranks_run_has_no_nproc():
    assert without_nproc(["compare", "w", "--nproc", "2", "--json"]) == ["compare", "w", "--json"]
    assert without_nproc(["compare", "--nproc=2", "w"]) == ["compare", "w"]


@pytest.mark.slow
def test_more_ranks_than_a_window_has_samples_are_refused():
    ended = program("compare", WORKLOAD, "--global-batch", "7", "--nproc", "2")
    assert ended.returncode == 2
    assert ended.stderr.count("a window of 1 samples cannot be shared by 2 processes") == 1
