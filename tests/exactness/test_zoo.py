"""The truth about every set-up of the zoo, in plain torch, so that no label can be wrong."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from zoo import ALL, RIGHT, UNKNOWABLE, WRONG, page

PAGE = Path(__file__).parents[2] / "docs" / "what-is-equal.md"
PROVABLE = [case for case in ALL if case.proof]
DRAWN = [case for case in ALL if not case.proof and case.guard in ("fits", "wrong")]


def in_float64(made):
    def double(leaf):
        return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return made._replace(model=made.model.double(), batch=tree_map(double, made.batch))


def parts_of(made, size=None):
    """The batch in ceil(N / size) nearly equal parts, the larger first: (rows, micro-batch) of each."""
    collate = made.options.get("collate")
    total = len(made.batch) if collate else len(tree_leaves(made.batch)[0])
    num_parts = -(-total // (size or total))
    stop = 0
    for part in range(num_parts):
        start, stop = stop, stop + total // num_parts + (part < total % num_parts)
        rows = slice(start, stop)
        batch = collate(made.batch[rows]) if collate else tree_map(lambda leaf, rows=rows: leaf[rows], made.batch)
        yield range(start, stop), batch


def terms_of(made, model, batch):
    loss = made.loss_fn(model, batch)
    return loss if isinstance(loss, dict) else {"loss": loss}


def full_gradient(made):
    ((_, batch),) = parts_of(made)
    return full_batch_gradient(made.model, lambda model: sum(terms_of(made, model, batch).values()))


def accumulated_gradient(made, draws_of=lambda rows: nullcontext()):
    """The loop that anybody would write: each term of each micro-batch, times its share of the whole."""
    parts = list(parts_of(made, made.options["micro_batch_size"]))
    weight = made.options.get("weight", "samples")
    model = copy.deepcopy(made.model)

    def share(name, index):
        one = weight[name] if isinstance(weight, dict) else weight
        if one == "sum":
            return 1.0
        weights = [len(rows) if one == "samples" else float(one(batch)) for rows, batch in parts]
        return weights[index] / sum(weights)

    for index, (rows, batch) in enumerate(parts):
        with draws_of(rows):
            terms = terms_of(made, model, batch)
            sum(term * share(name, index) for name, term in terms.items() if share(name, index)).backward()
    return gradients(model)


class Draws(TorchDispatchMode):
    """Keeps the random numbers that the batch draws, or gives them again to some of its rows, in the same order."""

    def __init__(self, kept=None, rows=None):
        super().__init__()
        self.kept = [] if kept is None else kept
        self.rows = rows
        self.num_drawn = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        drawn = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags or (func._opname == "native_dropout" and not args[2]):
            return drawn
        self.num_drawn += 1
        numbers = drawn[1] if func._opname == "native_dropout" else drawn
        if self.rows is None:
            self.kept.append(numbers.clone())
            return drawn
        numbers.copy_(self.of_rows(self.kept[self.num_drawn - 1], numbers.shape))
        return (args[0] * numbers / (1 - args[1]), numbers) if func._opname == "native_dropout" else drawn

    def of_rows(self, whole, shape):
        for dim, size in enumerate(shape):
            if size != whole.shape[dim]:  # rows, or rows times heads
                factor = size // len(self.rows)
                return whole.narrow(dim, self.rows.start * factor, size)
        return whole


def assert_label(case, accumulated, expected):
    assert all(gradient.isfinite().all() for gradient in expected.values())
    error = relative_error(accumulated, expected)
    if case.guard == "fits":
        assert error <= 1e-9
    elif case.guard in ("wrong", "refused"):
        assert error >= 1e-3


@pytest.mark.parametrize("case", PROVABLE, ids=lambda case: case.name)
def test_the_truth(case):
    made = in_float64(case.make())
    if case.cause == "NonFiniteLossError":
        ((_, batch),) = parts_of(made)
        assert not sum(terms_of(made, made.model, batch).values()).isfinite()
    else:
        assert_label(case, accumulated_gradient(made), full_gradient(in_float64(case.make())))


@pytest.mark.parametrize("case", DRAWN, ids=lambda case: case.name)
def test_the_truth_where_each_row_gets_the_same_draws(case):
    made = in_float64(case.make())
    with Draws() as whole:
        expected = full_gradient(made)
    assert whole.kept
    accumulated = accumulated_gradient(in_float64(case.make()), lambda rows: Draws(whole.kept, rows))
    assert_label(case, accumulated, expected)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_a_case_is_fresh_seeded_and_complete(case):
    first, second = case.make(), case.make()
    assert first.model is not second.model
    for one, other in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(tree_leaves(first.batch), tree_leaves(second.batch), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert case.why
    assert (case.cause is not None) == (case.guard in ("wrong", "refused"))
    assert bool(case.remedy) == (case.guard != "fits")


def test_the_zoo_is_large_and_names_are_unique():
    assert len(WRONG) >= 28 and len(RIGHT) >= 24 and len(UNKNOWABLE) >= 8
    assert len({case.name for case in ALL}) == len(ALL)
    causes = {"weights", "sum", "mean", "coupled", "batch_norm", "state", "grad_output", "empty"}
    assert {case.cause for case in WRONG if case.guard == "wrong"} == causes


def test_the_page_is_in_step_with_the_zoo():
    assert PAGE.read_text() == page.render(), "run: PYTHONPATH=tests .venv/bin/python -m zoo.page"
