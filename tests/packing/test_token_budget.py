"""The option: what it takes, what it refuses, and the lengths that it reads."""

from __future__ import annotations

import pytest
import torch

import gradfold
from gradfold.errors import BatchError, OptionError


def budget(**arguments):
    return gradfold.TokenBudget(**{"max_tokens": 10, "lengths": len} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 .* at least 1"),
        ({"max_tokens": 2.5}, "max_tokens=2.5 is a float; expected the number of padded tokens"),
        ({"max_tokens": True}, "is a bool"),
        ({"lengths": [1, 2]}, r"lengths= is a list; expected a callable .*attention_mask.*collate"),
        ({"padding_side": "top"}, 'padding_side=\'top\'; expected "right" or "left"'),
        ({"trim": "position_ids"}, r"trim='position_ids'; expected the names of tensors, trim=\(\"position_ids\",\)"),
        ({"cost": -1}, "expected a finite number"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_write(arguments, message):
    with pytest.raises(OptionError, match=message):
        budget(**arguments)


def test_a_cost_is_a_number_or_has_terms():
    assert budget().step_cost == gradfold.StepCost(None, 0.0)
    assert budget(cost=7).step_cost == gradfold.StepCost(7, 0.0)
    assert budget(cost=gradfold.StepCost(attention=0.5)).step_cost == gradfold.StepCost(None, 0.5)


@pytest.mark.parametrize(
    "found",
    [[3, 0, 2], (3, 0, 2), torch.tensor([3, 0, 2]), torch.tensor([3.0, 0.0, 2.0]), torch.tensor([3, 0, 2]).int()],
)
def test_lengths_are_whole_numbers_however_given(found):
    read = budget(lengths=lambda batch: found).lengths_of(None, 3)
    assert list(read) == [""] and torch.equal(read[""], torch.tensor([3, 0, 2]))


def test_several_inputs_have_lengths_by_name():
    read = budget(lengths=lambda batch: {"source": [1, 2], "target": [3, 4]}).lengths_of(None, 2)
    assert {name: lengths.tolist() for name, lengths in read.items()} == {"source": [1, 2], "target": [3, 4]}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([3, 2], r"the shape \(2,\); expected one length for each of the 3 rows"),
        (torch.ones(3, 1), r"the shape \(3, 1\)"),
        ([3, -1, 2], r"\[3, -1, 2\]; expected"),
        ([0.5, 1, 2], r"\[0.5, 1.0, 2.0\]; expected"),
        ([True, False, True], r"\[True, False, True\]"),
        ("abc", "a str; expected"),
        ({}, "an empty dict"),
        ({"source": [1]}, r"for 'source' the shape \(1,\)"),
    ],
)
def test_what_are_no_lengths_is_refused(found, message):
    with pytest.raises(BatchError, match=message):
        budget(lengths=lambda batch: found).lengths_of(None, 3)


def test_trim_is_by_input_where_there_are_several():
    two = budget(trim={"source": ("positions",), "target": {"bias": (1, 2), "whole": ()}})
    assert two.trim_of("source", ["source", "target"]) == {"positions": None}
    assert two.trim_of("target", ["source", "target"]) == {"bias": (1, 2), "whole": ()}
    assert budget(trim=("positions", 3)).trim_of("", [""]) == {"positions": None, 3: None}
    assert budget(trim={"bias": 2}).trim_of("", [""]) == {"bias": (2,)}
    with pytest.raises(OptionError, match=r"several inputs, 'source', 'target', .* trim=\{'source': \(...\)\}"):
        budget(trim=("positions",)).trim_of("source", ["source", "target"])
