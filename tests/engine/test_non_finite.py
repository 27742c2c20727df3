"""Inspected micro-batches: one gradient at a time, to see whose is not finite, and the error that says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradfold
from gradfold.batch.split import MicroBatch
from gradfold.engine.backward import BackPropagation
from gradfold.engine.recovery import gradient_error, inspect_each
from gradfold.engine.strategy import Sequential
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


class Inspected:
    """Micro-batches of one row, each of weight 1, and what is found in them."""

    def __init__(self, model, slopes):
        context = Context(model)
        self.snapshot = Snapshot(model, context.modules, context.parameters).__enter__()
        parts = micro_batches([{name: slope * len(slopes) for name, slope in one.items()} for one in slopes])
        self.window = Window(context, slope_loss, parts, "samples", BackPropagation(), PassListener())
        self.found = {}

    def run(self, indices=None):
        indices = self.window.pending() if indices is None else indices
        inspect_each(Sequential(slope_loss).run, self.found, self.window, indices, self.snapshot)
        return self

    @property
    def bad(self):
        parts = self.window.micro_batches
        return {index: self.found[id(part)] for index, part in enumerate(parts) if self.found[id(part)]}


def test_each_micro_batch_is_looked_at_by_itself(model):
    nan, inf = float("nan"), float("inf")
    window = Inspected(model, [{"a": 1}, {"b": nan}, {"a": 1, "b": 1}, {"a": -inf, "b": inf}, {"b": 2}]).run()
    assert window.bad == {1: ("b",), 3: ("a", "b")}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_that_only_sum_to_infinity_are_not_bad(model):
    assert Inspected(model, [{"a": torch.full((3,), 1e38)}] * 2).run().bad == {}  # 3e38 each


def test_a_second_run_forgets_the_first(model):
    """On out-of-memory the window begins again, in other micro-batches."""
    slopes = [{"a": float("nan")}, {"a": 1}]
    inspected = Inspected(model, slopes).run()
    assert inspected.bad == {0: ("a",)}
    inspected.window = inspected.window.again(micro_batches(slopes[::-1]))
    assert inspected.run().bad == {1: ("a",)}


def test_micro_batches_that_are_kept_stay_bad(model):
    """On out-of-memory a micro-batch that has left no trace is halved, and those before it are not run again."""
    nan = float("nan")
    inspected = Inspected(model, [{"a": 1}, {"b": nan}, {"a": 1}]).run([0, 1])
    assert inspected.window.pending() == [2]
    first, second = inspected.window.micro_batches[:2]
    smaller = micro_batches([{"a": 1}, {"a": nan}])
    inspected.window = inspected.window.again([first, smaller[0], second, smaller[1]], {0: 0, 1: 2})
    assert inspected.window.pending() == [1, 3]
    assert inspected.run().bad == {2: ("b",), 3: ("a",)}


def test_an_order_of_its_own_keeps_the_indices(model):
    assert Inspected(model, [{"a": 1}, {"a": float("nan")}, {"a": 1}]).run([2, 0, 1]).bad == {1: ("a",)}


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
