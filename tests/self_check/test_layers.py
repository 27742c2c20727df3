"""The layer tracer: inputs and outputs in order, and what counts as a change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradfold.self_check.layers import changed, traced_layers


def test_calls_come_in_order_with_their_callers():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh()))
    x = torch.randn(2, 3)
    with traced_layers(model) as calls:
        output = model(x)
    seen = [(call.name, "out" if call.is_output else "in", call.caller) for call in calls]
    inner = [("1", "in", ""), ("1.0", "in", "1"), ("1.0", "out", "1"), ("1", "out", "")]
    assert seen == [("", "in", None), ("0", "in", ""), ("0", "out", ""), *inner, ("", "out", None)]
    assert torch.equal(calls[0].tensors[0], x) and torch.equal(calls[-1].tensors[0], output)
    assert [str(call) for call in calls[:2]] == ["Sequential", "'0' (Linear)"]
    model(x)
    assert len(calls) == 8  # hooks are gone


def test_tensors_are_copies_also_those_passed_by_keyword():
    class Doubling(nn.Module):
        def forward(self, *, values):
            return {"doubled": values.mul_(2)}

    with traced_layers(Doubling()) as calls:
        pass
    assert calls == []
    model = Doubling()
    with traced_layers(model) as calls:
        model(values=torch.ones(2))
    assert [call.tensors[0].tolist() for call in calls] == [[1, 1], [2, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_rounding_is_no_change(dtype):
    reference = torch.linspace(1, 2, 4).to(dtype)
    eps = torch.finfo(dtype).eps
    assert changed(reference * (1 + 10 * eps), reference).tolist() == [False] * 4
    assert changed(reference + torch.tensor([0, 0, 1, 0]), reference).tolist() == [False, False, True, False]


def test_integers_change_by_any_difference_and_nan_by_its_place():
    assert changed(torch.tensor([1, 2]), torch.tensor([1, 3])).tolist() == [False, True]
    nan = torch.tensor([torch.nan, 1.0])
    assert not changed(nan, nan).any()
