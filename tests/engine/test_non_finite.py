"""An inspected window: one gradient at a time, to see whose is not finite, and the error that says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradfold
from gradfold.batch.split import MicroBatch
from gradfold.engine.backward import BackPropagation
from gradfold.engine.non_finite import InspectedWindow, gradient_error
from gradfold.engine.strategy import run_in_order
from gradfold.engine.window import Context, PassListener, Window
from gradfold.errors import NonFiniteGradientError
from gradfold.state.snapshot import Snapshot


class Named:
    """What `gradient_error` asks a window for."""

    def __init__(self, *rows):
        self.micro_batches = [MicroBatch(None, own) for own in rows]
        self.num_samples = rows[-1].stop


@pytest.fixture
def model():
    return nn.ParameterDict({"a": nn.Parameter(torch.zeros(1)), "b": nn.Parameter(torch.zeros(1))})


def slope_loss(model, slopes):
    """A loss whose gradient is these slopes, by parameter."""
    return sum((model[name] * slope).sum() for name, slope in slopes.items())


def micro_batches(slopes):
    return [MicroBatch(one, range(index, index + 1)) for index, one in enumerate(slopes)]


def make(model, slopes):
    """An inspected window of micro-batches of one row, each of weight 1."""
    context = Context(model)
    snapshot = Snapshot(model, context.modules, context.parameters).__enter__()
    parts = micro_batches(slopes)
    window = Window(context, slope_loss, parts, "samples", BackPropagation(), PassListener())
    return InspectedWindow(window, parts, snapshot)


def inspect(model, slopes, indices=None):
    window = make(model, [{name: slope * len(slopes) for name, slope in one.items()} for one in slopes])
    run_in_order(window, range(len(slopes)) if indices is None else indices)
    return window


def test_each_micro_batch_is_looked_at_by_itself(model):
    nan, inf = float("nan"), float("inf")
    window = inspect(model, [{"a": 1}, {"b": nan}, {"a": 1, "b": 1}, {"a": -inf, "b": inf}, {"b": 2}])
    assert window.bad == {1: ("b",), 3: ("a", "b")}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_that_only_sum_to_infinity_are_not_bad(model):
    assert inspect(model, [{"a": torch.full((3,), 1e38)}] * 2).bad == {}  # 3e38 each


def test_a_second_run_forgets_the_first(model):
    """On out-of-memory the window begins again, in other micro-batches."""
    slopes = [{"a": float("nan")}, {"a": 1}]
    window = inspect(model, slopes)
    assert window.bad == {0: ("a",)}
    window = window.again(micro_batches(slopes[::-1]))
    run_in_order(window, [0, 1])
    assert window.bad == {1: ("a",)}


def test_micro_batches_that_are_kept_stay_bad(model):
    """On out-of-memory a micro-batch that has left no trace is halved, and those before it are not run again."""
    nan = float("nan")
    window = make(model, [{"a": 1}, {"b": nan}, {"a": 1}])
    run_in_order(window, [0, 1])
    smaller = window.again(micro_batches([{"a": 1}, {"a": 1}, {"b": nan}, {"a": nan}]), {0: 0, 1: 2})
    assert smaller.pending() == [1, 3]
    run_in_order(smaller, smaller.pending())
    assert smaller.bad == {2: ("b",), 3: ("a",)}


def test_an_order_of_its_own_keeps_the_indices(model):
    assert inspect(model, [{"a": 1}, {"a": float("nan")}, {"a": 1}], [2, 0, 1]).bad == {1: ("a",)}


@pytest.mark.parametrize("policy", ["raise", "skip_micro_batch"])
def test_memory_that_runs_out_in_an_inspection_forgets_no_bad_micro_batch(policy):
    """The first micro-batch is bad; when it is looked for, the last one no longer fits."""
    model = nn.Linear(1, 1, bias=False)
    calls: list[list[float]] = []

    def loss_fn(model, batch):
        calls.append(batch.flatten().tolist())
        loss = model(batch).mean()
        if batch[0] == 0:
            return loss + (model.weight * 0).abs().sqrt().sum()  # finite, with a gradient of 0 * inf
        if len(calls) > 3 and len(batch) == 2 and batch[0] == 4:
            raise torch.OutOfMemoryError
        return loss

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, on_non_finite=policy, self_check=False)
    batch = torch.arange(6.0)[:, None]
    if policy == "raise":
        with pytest.raises(NonFiniteGradientError, match=r"micro-batch 0 of 4 \(rows 0 to 1\)"):
            accumulator.backward(batch)
    else:
        result = accumulator.backward(batch)
        skipped = [one.rows for one in result.recoveries if one.action == "skipped_micro_batch"]
        assert skipped == [range(2)] and result.weight == 4
        assert model.weight.grad.item() == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_the_first_micro_batch_is_named_with_rows_and_parameters():
    error = gradient_error(Named(range(4), range(4, 8), range(8, 12)), {2: ("x",), 1: ("a", "b", "c", "d", "e")})
    assert isinstance(error, NonFiniteGradientError)
    assert (error.micro_batch, error.rows, error.parameters) == (1, range(4, 8), ("a", "b", "c", "d", "e"))
    assert str(error).startswith(
        "the loss of micro-batch 1 of 3 (rows 4 to 7) is finite, its gradient of a, b, c and 2 more is not."
    )
    assert 'on_non_finite="skip_micro_batch"' in str(error)


def test_three_parameters_are_named_in_full():
    assert "gradient of a, b and c is not" in str(gradient_error(Named(range(4)), {0: ("a", "b", "c")}))


def test_where_none_is_bad_the_whole_batch_is_named():
    error = gradient_error(Named(range(4), range(4, 9)), {})
    assert (error.micro_batch, error.rows, error.parameters) == (None, range(9), ())
