"""The public surface: an explicit, documented list, with an example for everything that a user calls."""

from __future__ import annotations

import inspect
import pickle

import gradfold

CALLED = {
    "Accumulator",
    "Auto",
    "Batching",
    "Grouped",
    "Packed",
    "Stacked",
    "Precision",
    "StepCost",
    "TokenBudget",
    "TrainStep",
    "TwoPhaseLoss",
    "convert_batch_norm",
    "convert_dropout",
    "counter_based_dropout",
    "is_probing",
    "measure_peak",
    "plan",
    "token_count",
    "verify",
    "windows",
}
RETURNED = {
    "LoadedWindow",
    "LoopWindow",
    "MicroBatchChoice",
    "PeakMemory",
    "Plan",
    "PlanRow",
    "Recovery",
    "SizeTiming",
    "StepResult",
    "TokenCount",
    "Verdict",
    "WindowResult",
    "Workload",
}
PUBLIC = {
    name: value for name, value in vars(gradfold).items() if not name.startswith("_") and not inspect.ismodule(value)
}
ERRORS = {name: value for name, value in PUBLIC.items() if name.endswith("Error")}


def functions_of(value: object) -> dict[str, object]:
    """The public functions of a class or module of ours."""
    return {
        name: function
        for name, function in inspect.getmembers(value, inspect.isfunction)
        if not name.startswith("_") and function.__module__.startswith("gradfold")
    }


def test_the_public_names_are_these_and_the_errors():
    assert PUBLIC.keys() - ERRORS.keys() == CALLED | RETURNED
    assert ERRORS.keys() == {name for name in vars(gradfold.errors) if name.endswith("Error")}


def test_errors_form_one_tree_with_exit_codes():
    tree = gradfold.errors.__doc__.replace("(", " (")
    assert [name for name, error in ERRORS.items() if not issubclass(error, gradfold.GradfoldError)] == []
    assert [name for name, error in ERRORS.items() if error.exit_code not in (1, 2)] == []
    assert [name for name in ERRORS if f"{name} " not in tree] == []


def test_errors_can_be_pickled_with_their_facts():
    for error in ERRORS.values():
        made = error("what was given", *range(len(inspect.signature(error).parameters) - 1))
        copied = pickle.loads(pickle.dumps(made))
        assert type(copied) is error and str(copied) == "what was given" and vars(copied) == vars(made), error


def test_everything_public_is_documented():
    assert [name for name, value in PUBLIC.items() if not value.__doc__] == []
    functions = {f"{name}.{one}": it for name, value in PUBLIC.items() for one, it in functions_of(value).items()}
    assert [name for name, function in functions.items() if not function.__doc__] == []


def test_everything_that_is_called_has_an_example():
    def has_example(value: object) -> bool:
        return any(">>>" in (one.__doc__ or "") for one in (value, *functions_of(value).values()))

    called = {name: PUBLIC[name] for name in CALLED} | functions_of(gradfold.losses)
    assert [name for name, value in called.items() if not has_example(value)] == []
