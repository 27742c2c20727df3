"""What `gradfold.verify` says about every set-up of the zoo."""

from __future__ import annotations

import pytest
from reference import assert_same_state, state
from zoo import ALL

import gradfold

CASES = [case for case in ALL if case.in_verify]

# Where the cause differs from what the guard says, and why.
OTHERWISE = {
    # The guard stops at the class of the error; verify measures on and says what the matter is.
    **{f"`nn.{name}` in training mode": "batch_norm" for name in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")},
    "`nn.SyncBatchNorm` in training mode": "batch_norm",
    "one row whose loss is NaN": "non_finite",
    # The guard's part has no label at all; 30 % of the whole batch have one, and so the weight that fits is found.
    "a part without any label, weighted by samples": "weights",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_verdict_tells_the_truth(case):
    made = case.make()
    before = state(made.model)
    verdict = gradfold.verify(gradfold.Accumulator(made.model, made.loss_fn, **made.options), made.batch)
    assert_same_state(state(made.model), before)
    if case.guard == "fits":
        assert verdict.ok, verdict
        assert verdict.max_relative_error <= verdict.tolerance == 1e-12
        assert verdict.causes == ()
    else:
        assert not verdict.ok, verdict
        assert verdict.causes[0].name == OTHERWISE.get(case.name, case.cause), verdict
        assert case.cause == "NonFiniteLossError" or verdict.max_relative_error > 1e-3
        with pytest.raises(gradfold.NotDecomposableError):
            verdict.raise_if_wrong()


def test_there_are_many_cases():
    assert len(CASES) >= 100
    assert set(OTHERWISE) <= {case.name for case in CASES}
