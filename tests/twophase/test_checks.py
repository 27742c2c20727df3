"""Statistics without a gradient, which the guard examines by their values."""

from __future__ import annotations

import pytest
import torch
import two_phase_cases as cases
from torch import nn
from torch.nn import functional as F

import gradfold
from gradfold.self_check.experiment import UndecidedError
from gradfold.self_check.observations import ObservedRun
from gradfold.twophase.checks import check_constants


def batch(num_rows=20):
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(num_rows, 6, generator=generator, dtype=torch.float64),
        "id": torch.randint(0, 1000, (num_rows,), generator=generator),
        "target": torch.randn(num_rows, generator=generator, dtype=torch.float64),
    }


def model():
    torch.manual_seed(0)
    return nn.Sequential(cases.net(6, 4), nn.Dropout(0.2)).double()


def run(label, combine="concatenate", net=None, rows=20, size=7):
    def statistic(model, batch):
        z = model(batch["x"])
        return {"z": z if combine == "concatenate" else z.sum(0), "label": label(model, batch)}

    loss_fn = gradfold.TwoPhaseLoss(statistic, lambda model, found: found["z"].square().mean(), combine=combine)
    accumulator = gradfold.Accumulator(net or model(), loss_fn, micro_batch_size=size)
    try:
        accumulator.backward(batch(rows))
    except gradfold.NotDecomposableError as error:
        with pytest.raises(gradfold.NotDecomposableError) as again:  # however often it is tried
            accumulator.backward(batch(rows))
        assert str(again.value) == str(error)
        raise


@pytest.mark.parametrize("size", [2, 3, 7])
@pytest.mark.parametrize(
    "label",
    [
        lambda model, batch: torch.arange(len(batch["x"])),
        lambda model, batch: torch.unique(batch["id"], return_inverse=True)[1],
        lambda model, batch: batch["target"] - batch["target"].mean(),
        lambda model, batch: batch["target"].argsort().argsort(),
        lambda model, batch: torch.full((len(batch["x"]), 1), len(batch["x"])),
        lambda model, batch: batch["id"] == batch["id"].max(),
        lambda model, batch: torch.ones(5),
        lambda model, batch: len(batch["x"]),
        lambda model, batch: model(batch["x"]).detach() - model(batch["x"]).detach().mean(0),
    ],
    ids=["index", "inverse", "centered", "rank", "count per row", "largest", "no rows", "count", "frozen"],
)
def test_labels_that_depend_on_other_rows_are_refused(label, size):
    """They went unchecked: a label that is an index within the micro-batch came again in each of them."""
    with pytest.raises(gradfold.NotDecomposableError, match=r"the statistic \['label'\] of the TwoPhaseLoss") as e:
        run(label, size=size)
    assert e.value.cause == "coupled" and "loss(model, statistics)" in str(e.value)


@pytest.mark.parametrize(
    "label",
    [
        lambda model, batch: batch["id"],
        lambda model, batch: batch["target"].masked_fill(batch["id"] % 3 == 0, torch.nan),
        lambda model, batch: batch["target"].masked_fill(batch["id"] % 3 == 0, torch.inf),
        lambda model, batch: batch["id"][batch["id"] % 2 == 0],
        lambda model, batch: (model(batch["x"]).argmax(1), model(batch["x"]).detach()),
        lambda model, batch: torch.rand(len(batch["x"])),
        lambda model, batch: ("text", 3, None, True),
    ],
    ids=["ids", "missing", "infinite", "some rows", "pseudo-labels", "random", "constants"],
)
@pytest.mark.parametrize("size", [2, 7])
def test_labels_of_rows_are_right(label, size):
    run(label, size=size)


def test_means_among_sums_are_refused_and_sums_are_right():
    for label in (
        lambda model, batch: batch["target"].mean(),
        lambda model, batch: (batch["id"] % 2).double().mean(0, keepdim=True),
        lambda model, batch: (batch["id"] > 500).double().mean().item(),
    ):
        with pytest.raises(gradfold.NotDecomposableError, match=r"\['label'\] .* Return sums over rows, not means"):
            run(label, "sum")
    for label in (
        lambda model, batch: batch["target"].sum(),
        lambda model, batch: F.one_hot(batch["id"] % 5, 5).sum(0),
        lambda model, batch: len(batch["x"]),
        lambda model, batch: float(batch["target"].sum()),
        lambda model, batch: ("text", True, None),
    ):
        run(label, "sum")


def judged(whole, first, second, dtype, combine="concatenate"):
    runs = [ObservedRun(len(value), {"": value}) for value in (whole, first, second)]
    check_constants(runs, combine, [dtype])


def test_what_rounding_explains_is_let_pass():
    whole = torch.randint(0, 9, (2000,))
    for dtype, most in ((torch.bfloat16, 199), (torch.float32, 1)):
        for num_others in (most, most + 1):
            parts = whole.clone()
            parts[:num_others] += 1
            if num_others == most:
                judged(whole, parts[:600], parts[600:], dtype)
            else:
                with pytest.raises(gradfold.NotDecomposableError, match=r"Seen: \d at \[0\] of the whole, \d of the"):
                    judged(whole, parts[:600], parts[600:], dtype)
    floats = torch.randn(2000)
    judged(floats, floats[:600] * (1 + 1e-6), floats[600:], torch.float32)
    with pytest.raises(gradfold.NotDecomposableError):
        judged(floats.double(), floats[:600].double() * (1 + 1e-6), floats[600:].double(), torch.float64)


def test_nothing_is_held_where_the_guard_was_not_content():
    loss_fn = gradfold.TwoPhaseLoss(lambda model, batch: torch.arange(len(batch)), lambda model, found: found.sum())
    strategy = gradfold.Accumulator(model(), loss_fn, micro_batch_size=1)._strategy
    for rows in (3, 1, 2):
        with pytest.raises(UndecidedError):
            strategy.probe_loss(None, torch.zeros(rows))
    assert len(strategy._runs._last) == 3
    strategy.judge(False)
    strategy.judge(True)
    assert not strategy._runs._last
