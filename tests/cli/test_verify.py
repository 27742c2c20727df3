"""The command `gradfold verify`: what it prints, and how it ends."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import gradfold.__main__
import gradfold.cli


def run(*arguments):
    """Exit code and standard output of `gradfold verify ...`."""
    ended = CliRunner().invoke(gradfold.cli.app, ["verify", *arguments])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.stdout


def test_a_workload_that_holds():
    code, printed = run("linear")
    assert code == 0
    assert "EXACT: the accumulated gradient is that of the whole batch" in printed
    assert "micro-batch  how many  error" in printed and "weight" in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_a_weight_that_does_not_fit_is_named():
    code, printed = run("encoder", "--weight", "samples", "--global-batch", "6")
    assert code == 1
    assert "NOT EXACT" in printed and "Cause: weights" in printed
    assert 'weight=gradfold.token_count("labels")' in " ".join(printed.split())
    assert run("encoder", "--weight", "tokens:labels", "--global-batch", "6")[0] == 0


def test_batch_norm_layers_are_named():
    code, printed = run("resnet", "--global-batch", "8", "--micro-batch", "4")
    assert code == 1
    assert "Cause: batch_norm" in printed and "'blocks.0.bn1'" in printed and "nothing else is wrong" in printed


def test_exact_batch_norm_holds():
    code, printed = run("resnet", "--global-batch", "8", "--micro-batch", "3", "--batch-norm", "exact")
    assert code == 0 and "EXACT" in printed
    code, printed = run("resnet", "--global-batch", "8", "--micro-batch", "4", "--batch-norm", "refuse")
    assert code == 1 and "would accept" in " ".join(printed.split())


def test_json_and_sizes():
    code, printed = run(
        "linear", "--json", "--micro-batch", "5,7", "--micro-batch", "16", "--dtype", "float32", "--seed", "3"
    )
    found = json.loads(printed)
    assert code == 0 and found["ok"] and found["workload"] == "linear" and found["seed"] == 3
    assert [row["size"] for row in found["sizes"]] == [5, 7, 16]
    assert found["dtype"] == "float32" and found["num_rows"] == 64
    assert found["max_relative_error"] <= found["tolerance"]
    assert [row["name"] for row in found["parameters"]] == ["weight", "bias"]


def test_the_seed_draws_weights_and_samples():
    norms = [
        json.loads(run("linear", "--json", "--seed", seed)[1])["parameters"][0]["norm"] for seed in ("1", "1", "2")
    ]
    assert norms[0] == norms[1] != norms[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear", "--weight", "token"], "expected samples, or tokens:KEY"),
        (["linear", "--weight", "tokens:"], "expected samples, or tokens:KEY"),
        (["linear", "--micro-batch", "5,x"], "such as 1,5,16"),
        (["linear", "--micro-batch", "0"], "at least 1"),
        (["linear", "--micro-batch", "64"], "is the whole batch of 64"),
        (["linear", "--global-batch", "1"], "expected 2 to 1600 samples"),
        (["linear", "--seed", "-1"], "--seed -1"),
        (["linaer"], "Did you mean 'linear'?"),
        (["linear", "--dtype", "int8"], "--dtype"),
        ([], "WORKLOAD"),
    ],
)
def test_wrong_usage_ends_with_two_and_a_message(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gradfold", "verify", *arguments])
    with pytest.raises(SystemExit) as end:
        gradfold.__main__.main()
    printed = capsys.readouterr()
    assert end.value.code == 2
    assert message.lower() in printed.err.lower() and "Traceback" not in printed.err
    assert printed.out == ""


def test_help_teaches():
    shown = CliRunner().invoke(gradfold.cli.app, ["verify", "--help"], env={"COLUMNS": "200"}).stdout
    for phrase in ("--weight", "tokens:KEY", "--micro-batch", "Examples", "gradfold verify resnet", "Exit codes"):
        assert phrase in shown
    assert "verify" in CliRunner().invoke(gradfold.cli.app, ["--help"]).stdout
