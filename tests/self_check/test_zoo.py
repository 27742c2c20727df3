"""What the self-check says about every set-up of the zoo."""

from __future__ import annotations

import re
import warnings

import pytest
from reference import assert_same_state, state
from zoo import ALL

import gradfold


def accumulate(made):
    return gradfold.Accumulator(made.model, made.loss_fn, **made.options).backward(made.batch)


def cases(*guards):
    chosen = [case for case in ALL if case.guard in guards]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


@cases("wrong")
def test_what_is_wrong_is_refused_with_its_cause(case):
    made = case.make()
    before = state(made.model)
    with pytest.raises(gradfold.NotDecomposableError) as caught:
        accumulate(made)
    assert caught.value.cause == case.cause, caught.value
    assert re.search(case.says, str(caught.value)), caught.value
    assert_same_state(state(made.model), before)


@cases("refused")
def test_what_is_refused_before_the_self_check(case):
    made = case.make()
    with pytest.raises(getattr(gradfold, case.cause), match=case.says):
        accumulate(made)


@cases("fits", "undecided")
def test_nothing_is_said_about_what_fits_or_cannot_be_seen(case):
    accumulate(case.make())  # warnings are errors


@cases("warns")
def test_one_warning_about_what_cannot_be_known(case):
    made = case.make()
    accumulator = gradfold.Accumulator(made.model, made.loss_fn, **made.options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accumulator.backward(made.batch)
        accumulator.backward(made.batch)
    assert [warning.category for warning in caught] == [RuntimeWarning]
    assert re.search(case.says, str(caught[0].message)), caught[0].message
