"""Draws ahead: parts of a batch run before the batch does, each row with the numbers that it will have there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradfold.self_check.draws_ahead import DrawsAhead

ROWS, LAST = 8, 5


def inputs(*shape):
    generator = torch.Generator().manual_seed(0)
    return 0.1 + 0.8 * torch.rand(*shape, generator=generator, dtype=torch.float64)


def in_parts(function, batch, dim=0):
    """The outputs of the first and of the last rows, the mode, and the random state after the last rows."""
    torch.manual_seed(3)
    mode = DrawsAhead(ROWS, LAST)
    with mode:
        last = function(batch.narrow(dim, ROWS - LAST, LAST))
    state = torch.get_rng_state()
    mode.go_on()
    with mode:
        first = function(batch.narrow(dim, 0, ROWS - LAST))
    return first, last, mode, state


def check(function, batch, dim=0):
    """Assert that parts that run first are what the whole will be, and leave the generator where it will."""
    first, last, mode, state = in_parts(function, batch, dim)
    torch.manual_seed(3)
    whole = function(batch)
    assert torch.equal(torch.cat([first, last], dim), whole)
    assert torch.equal(state, torch.get_rng_state())
    assert mode.unknown is None
    return mode


BY_SHAPE = {
    "rand": lambda x: torch.rand(x.shape),
    "randn": lambda x: torch.randn(len(x), 2),
    "randn of many": lambda x: torch.randn(len(x), 50),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint": lambda x: torch.randint(0, 1000, (len(x),)),
    "randint_like": lambda x: torch.randint_like(x, 1000),
    "random_": lambda x: torch.empty_like(x).random_(),
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.4),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 1),
    "normal_": lambda x: torch.empty_like(x).normal_(1, 2),
    "gumbel_softmax": F.gumbel_softmax,
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "dropout": F.dropout,
    "dropout in place": lambda x: F.dropout(x.clone(), 0.3, inplace=True),
    "dropout with p=0": lambda x: F.dropout(x, 0.0),
    "dropout with p=1": lambda x: F.dropout(x, 1.0),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.4, True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x[..., None], 0.4, True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "the mask of native_dropout": lambda x: torch.native_dropout(x, 0.3, True)[1],
    "two draws of one shape": lambda x: torch.rand_like(x) - torch.rand_like(x),
    "a draw for the whole batch": lambda x: x * torch.rand(3, dtype=x.dtype) + torch.randn(()),
    "a draw in place of a part of a tensor": lambda x: x.clone().index_fill_(1, torch.tensor([0]), 0)[:, 1:].uniform_(),
}


@pytest.mark.parametrize("function", BY_SHAPE.values(), ids=BY_SHAPE.keys())
def test_rows_have_the_numbers_that_the_batch_will_draw_for_them(function):
    check(function, inputs(ROWS, 3))


@pytest.mark.parametrize("shape", [(3, ROWS), (3, ROWS, 2), (2, 3, ROWS)])
def test_rows_may_stand_in_any_dimension(shape):
    check(F.dropout, inputs(*shape), shape.index(ROWS))


def test_rows_may_be_folded_with_what_follows_them():
    check(lambda x: F.dropout(x.flatten(0, 1)).view(x.shape), inputs(ROWS, 7, 2))


def test_numbers_come_in_the_order_of_memory():
    # torch.rand_like keeps the order of dimensions in memory, and fills in that order.
    check(torch.rand_like, inputs(ROWS, 3, 4, 2).to(memory_format=torch.channels_last))
    check(torch.rand_like, inputs(7, ROWS).t())


UNKNOWN = {
    "bernoulli": torch.bernoulli,
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(x),
    "normal": lambda x: torch.normal(x, 2.0),
    "poisson": lambda x: torch.poisson(10 * x),
    "randperm": lambda x: x[torch.randperm(len(x))],
    "multinomial": lambda x: torch.multinomial(x, 1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_draws_that_cannot_be_foreseen_are_named(name):
    assert in_parts(UNKNOWN[name], inputs(ROWS, 3))[2].unknown == name


def test_an_operator_that_may_draw_and_does_not_is_no_draw():
    assert in_parts(lambda x: x + torch.randperm(0).sum(), inputs(ROWS, 3))[2].unknown is None


def test_a_dimension_that_only_looks_like_the_rows_shows_in_the_other_part():
    def weights_drop(x):
        return x @ F.dropout(torch.ones(LAST, 3, dtype=x.dtype))

    assert in_parts(weights_drop, inputs(ROWS, LAST))[2].unknown == "bernoulli_"


def test_rows_that_draw_more_often_than_the_last_are_noted():
    def by_size(x):
        return torch.rand_like(x) + (torch.rand_like(x) if len(x) < LAST else 0)

    assert in_parts(by_size, inputs(ROWS, 3))[2].unknown == "rand_like"


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_a_checkpoint_draws_again_is_the_same(use_reentrant):
    model = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 2)).double()

    def slope(x):
        model.zero_grad()
        out = checkpoint(model, F.dropout(x.requires_grad_()), use_reentrant=use_reentrant)
        out.square().sum().backward()
        return model[0].weight.grad.clone()

    first, last, mode, _ = in_parts(lambda x: slope(x.clone()), inputs(ROWS, 3))
    torch.manual_seed(3)
    torch.testing.assert_close(first + last, slope(inputs(ROWS, 3)), rtol=1e-12, atol=1e-12)
    assert mode.unknown is None


def test_generators_of_the_users_own_are_set_back():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    mode = in_parts(lambda x: torch.rand(x.shape, generator=generator), inputs(ROWS, 3))[2]
    assert mode.restore_generators()
    assert torch.equal(generator.get_state(), before)
    assert not in_parts(F.dropout, inputs(ROWS, 3))[2].restore_generators()


def test_what_is_kept_is_no_more_than_the_other_rows():
    mode = DrawsAhead(ROWS, LAST)
    with mode:
        F.dropout(torch.ones(LAST, 100))
        torch.rand(LAST, 100)
    masks, numbers = mode._kept
    assert masks.untyped_storage().nbytes() == (ROWS - LAST) * 100
    assert numbers.untyped_storage().nbytes() == (ROWS - LAST) * 100 * 4


def test_results_hold_on_to_no_other_rows():
    mode = DrawsAhead(ROWS, LAST)
    with mode:
        drawn = torch.rand(LAST, 100), *torch.native_dropout(torch.ones(LAST, 100), 0.3, True)
    assert all(one.untyped_storage().nbytes() == LAST * 100 * one.element_size() for one in drawn)


def test_precisions_are_noted():
    mode = DrawsAhead(ROWS, LAST)
    with mode:
        torch.ones(LAST).double().to(torch.bfloat16)
    assert {torch.float64, torch.bfloat16} <= mode.dtypes
