"""The public surface: an explicit, documented list."""

from __future__ import annotations

import inspect

import gradfold

PUBLIC = {
    "Accumulator",
    "Auto",
    "LoopWindow",
    "MicroBatchChoice",
    "PeakMemory",
    "Plan",
    "PlanRow",
    "Precision",
    "Recovery",
    "StepCost",
    "SizeTiming",
    "StepResult",
    "TokenBudget",
    "TokenCount",
    "TrainStep",
    "TwoPhaseLoss",
    "Verdict",
    "Window",
    "WindowResult",
    "Workload",
    "convert_batch_norm",
    "convert_dropout",
    "keyed_dropout",
    "measure_peak",
    "plan",
    "token_count",
    "verify",
    "windows",
}


def public_names() -> set[str]:
    return {name for name, value in vars(gradfold).items() if not name.startswith("_") and not inspect.ismodule(value)}


def test_the_public_names_are_these_and_the_errors():
    errors = {name for name in public_names() if name.endswith("Error")}
    assert public_names() - errors == PUBLIC
    assert errors == {name for name in vars(gradfold.errors) if name.endswith("Error")}


def test_errors_form_one_tree_with_exit_codes():
    for name in public_names():
        if name.endswith("Error"):
            error = getattr(gradfold, name)
            assert issubclass(error, gradfold.GradfoldError)
            assert error.exit_code in (1, 2)
            assert f"{name} " in gradfold.errors.__doc__.replace("(", " (")


def test_everything_public_is_documented():
    for name in public_names():
        value = getattr(gradfold, name)
        assert value.__doc__, name
        for member, function in inspect.getmembers(value, inspect.isfunction):
            if not member.startswith("_") and function.__module__.startswith("gradfold"):
                assert function.__doc__, f"{name}.{member}"
