"""An inspection: one gradient at a time, to see whose is not finite, and the error that says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradfold.batch.split import MicroBatch
from gradfold.engine.non_finite import Inspection, accuse
from gradfold.engine.window import one_after_another
from gradfold.errors import NonFiniteGradientError
from gradfold.state.buffers import BufferKeeper
from gradfold.state.snapshot import Snapshot


class Named:
    """What `accuse` asks a window for."""

    def __init__(self, *rows):
        self.micro_batches = [MicroBatch(None, own) for own in rows]
        self.num_samples = rows[-1].stop


@pytest.fixture
def model():
    return nn.ParameterDict({"a": nn.Parameter(torch.zeros(1)), "b": nn.Parameter(torch.zeros(1))})


def inspect(model, slopes):
    """Run micro-batches whose gradients are these, by parameter."""
    transaction = Snapshot(model, list(model.modules()), list(model.parameters()), BufferKeeper()).__enter__()
    inspection = Inspection(model, transaction)

    def forward(index):
        return [(sum((model[name] * slope).sum() for name, slope in slopes[index].items()), 1.0)]

    def backward(weighed):
        weighed[0][0].backward()

    schedule = inspection.around(one_after_another)
    schedule(range(len(slopes)), forward, backward)
    return inspection, schedule, forward, backward


def test_each_micro_batch_is_looked_at_by_itself(model):
    nan, inf = float("nan"), float("inf")
    inspection, *_ = inspect(model, [{"a": 1}, {"b": nan}, {"a": 1, "b": 1}, {"a": -inf, "b": inf}, {"b": 2}])
    assert inspection.bad == {1: ("b",), 3: ("a", "b")}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_that_only_sum_to_infinity_are_not_bad(model):
    inspection, *_ = inspect(model, [{"a": 3e38}, {"a": 3e38}])
    assert inspection.bad == {}


def test_a_second_run_forgets_the_first(model):
    """Memory that runs out makes the window begin again, in other micro-batches."""
    slopes = [{"a": float("nan")}, {"a": 1}]
    inspection, schedule, forward, backward = inspect(model, slopes)
    assert inspection.bad == {0: ("a",)}
    slopes.reverse()
    schedule(range(2), forward, backward)
    assert inspection.bad == {1: ("a",)}


def test_an_order_of_its_own_keeps_the_indices(model):
    slopes = [{"a": 1}, {"a": float("nan")}, {"a": 1}]
    inspection, schedule, forward, backward = inspect(model, slopes)
    schedule([2, 0, 1], forward, backward)
    assert inspection.bad == {1: ("a",)}


def test_the_first_micro_batch_is_accused_with_rows_and_parameters():
    error = accuse(Named(range(4), range(4, 8), range(8, 12)), {2: ("x",), 1: ("a", "b", "c", "d", "e")})
    assert isinstance(error, NonFiniteGradientError)
    assert (error.micro_batch, error.rows, error.parameters) == (1, range(4, 8), ("a", "b", "c", "d", "e"))
    assert str(error).startswith(
        "the loss of micro-batch 1 of 3 (rows 4 to 7) is finite, its gradient of a, b, c and 2 more is not."
    )
    assert 'on_non_finite="skip_micro_batch"' in str(error)


def test_three_parameters_are_named_in_full():
    assert "gradient of a, b, c is not" in str(accuse(Named(range(4)), {0: ("a", "b", "c")}))


def test_where_none_is_bad_the_whole_batch_is_named():
    error = accuse(Named(range(4), range(4, 9)), {})
    assert (error.micro_batch, error.rows, error.parameters) == (None, range(9), ())
