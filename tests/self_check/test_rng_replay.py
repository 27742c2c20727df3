"""Draws of random numbers: a batch in parts, each row with the numbers that it had in the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradfold.self_check.rng_replay import RecordedRandomness, RowRandomness

ROWS, SPLIT = 6, (range(0, 2), range(2, 6))  # unequal parts


def record(function, batch):
    """The output of `function` on the whole batch, and its draws."""
    torch.manual_seed(3)
    with RecordedRandomness() as recorded:
        whole = function(batch)
    recorded.restore_generators()
    return whole, recorded


def run_part(function, batch, recorded, rows, dim=0):
    with RowRandomness(recorded, ROWS, rows) as draws:
        output = function(batch.narrow(dim, rows.start, len(rows)))
    draws.finish()
    draws.restore_generators()
    return output, draws


def in_parts(function, batch, recorded, dim=0):
    """The outputs of both parts, and what handed them their draws. They start from a random state of their own."""
    torch.manual_seed(4)
    return zip(*[run_part(function, batch, recorded, rows, dim) for rows in SPLIT], strict=True)


def inputs(*shape, low=0.1, high=0.9):
    generator = torch.Generator().manual_seed(0)
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)


def gamma(x):
    return torch.distributions.Gamma(x, x).sample()


KEYED = {
    "rand": lambda x: torch.rand(x.shape),
    "randn": lambda x: torch.randn(len(x), 2),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint": lambda x: torch.randint(0, 1000, (len(x),)),
    "randint_like": lambda x: torch.randint_like(x, 1000),
    "random_": lambda x: torch.empty_like(x).random_(),
    "bernoulli of a tensor": torch.bernoulli,
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.4),
    "bernoulli_ by a tensor": lambda x: torch.empty_like(x).bernoulli_(x),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 1),
    "normal_": lambda x: torch.empty_like(x).normal_(1, 2),
    "normal with a mean per element": lambda x: torch.normal(x, 2.0),
    "normal with a spread per element": lambda x: torch.normal(1.0, x),
    "normal with both per element": lambda x: torch.normal(x, x),
    "gumbel_softmax": F.gumbel_softmax,
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.3),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "poisson": lambda x: torch.poisson(10 * x),
    "binomial": lambda x: torch.binomial(torch.full_like(x, 10), x),
    "gamma": gamma,
    "dropout": F.dropout,
    "dropout in place": lambda x: F.dropout(x.clone(), 0.3, inplace=True),
    "dropout with p=0": lambda x: F.dropout(x, 0.0),
    "dropout with p=1": lambda x: F.dropout(x, 1.0),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.4, True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x[..., None], 0.4, True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "the mask of native_dropout": lambda x: torch.native_dropout(x, 0.3, True)[1],
    "two draws of one shape": lambda x: torch.rand_like(x) - torch.rand_like(x),
    "a draw of nothing before another": lambda x: torch.rand(0).sum() + torch.rand_like(x),
    "a draw for the whole batch": lambda x: x * torch.rand(3, dtype=x.dtype) + torch.randn(()),
    "draws in unequal order of shapes": lambda x: torch.rand(len(x), 1) + torch.rand(3) + torch.rand(len(x), 3),
}


@pytest.mark.parametrize("function", KEYED.values(), ids=KEYED.keys())
def test_parts_draw_what_their_rows_drew_in_the_whole(function):
    x = inputs(ROWS, 3)
    whole, recorded = record(function, x)
    parts, draws = in_parts(function, x, recorded)
    assert torch.equal(torch.cat(parts), whole)
    assert [one.unknown for one in draws] == [None, None]


@pytest.mark.parametrize("layer", [nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout])
def test_layers_that_drop_whole_channels(layer):
    x = inputs(ROWS, 4, *[3] * {"Dropout1d": 1, "Dropout2d": 2}.get(layer.__name__, 3))
    whole, recorded = record(layer(0.4), x)
    parts, _draws = in_parts(layer(0.4), x, recorded)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("shape", [(3, ROWS), (3, ROWS, 2), (2, 3, ROWS)])
def test_rows_may_stand_in_any_dimension(shape):
    dim = shape.index(ROWS)
    x = inputs(*shape)
    whole, recorded = record(F.dropout, x)
    parts, _draws = in_parts(F.dropout, x, recorded, dim)
    assert torch.equal(torch.cat(parts, dim), whole)


def test_rows_may_be_folded_into_a_longer_dimension():
    def flattened(x):
        return F.dropout(x.flatten(0, 1)).view(x.shape)

    x = inputs(ROWS, 5, 2)
    whole, recorded = record(flattened, x)
    parts, draws = in_parts(flattened, x, recorded)
    assert torch.equal(torch.cat(parts), whole)  # row by row, the usual layout
    assert [one.unknown for one in draws] == [None, None]


def test_gradients_pass_the_draws_of_the_rows():
    x = inputs(ROWS, 3).requires_grad_()

    def slope(part):
        return torch.autograd.grad(torch.native_dropout(part, 0.3, True)[0].sum(), x)[0]

    whole, recorded = record(slope, x)
    parts, _ = in_parts(slope, x, recorded)
    assert torch.equal(sum(parts), whole)
    assert 0 < int((whole == 0).sum()) < whole.numel()


def test_a_sample_of_a_distribution_passes_its_gradient():
    concentration = inputs(ROWS, 3).requires_grad_()

    def slope(part):
        return torch.autograd.grad(torch.distributions.Gamma(part, 1.0).rsample().sum(), concentration)[0]

    whole, recorded = record(slope, concentration)
    parts, _ = in_parts(slope, concentration, recorded)
    assert torch.equal(sum(parts), whole)


def layers(**made):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {name: make().double().train() for name, make in made.items()}


LAYERS = layers(
    lstm=lambda: nn.LSTM(3, 4, num_layers=3, dropout=0.4, batch_first=True),
    time_first=lambda: nn.LSTM(3, 4, num_layers=2, dropout=0.4),
    gru=lambda: nn.GRU(3, 4, num_layers=2, dropout=0.4, batch_first=True),
    attention=lambda: nn.MultiheadAttention(3, 3, dropout=0.4, batch_first=True),
    encoder=lambda: nn.TransformerEncoderLayer(3, 3, 8, 0.4, batch_first=True),
)
FORWARDS = {
    "LSTM": lambda x: LAYERS["lstm"](x)[0],
    "LSTM, time first": lambda x: LAYERS["time_first"](x.transpose(0, 1))[0].transpose(0, 1),
    "GRU": lambda x: LAYERS["gru"](x)[0],
    "MultiheadAttention": lambda x: LAYERS["attention"](x, x, x)[0],
    "MultiheadAttention without weights": lambda x: LAYERS["attention"](x, x, x, need_weights=False)[0],
    "TransformerEncoderLayer": lambda x: LAYERS["encoder"](x),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.4),
    "the same with heads": lambda x: F.scaled_dot_product_attention(*[x[:, None].repeat(1, 4, 1, 1)] * 3, None, 0.4),
}


@pytest.mark.parametrize("forward", FORWARDS.values(), ids=FORWARDS.keys())
def test_layers_that_drop_inside(forward):
    x = inputs(ROWS, 5, 3)
    whole, recorded = record(forward, x)
    parts, draws = in_parts(forward, x, recorded)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-14)
    assert [one.unknown for one in draws] == [None, None]
    assert recorded.values


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_draws_the_same_again(use_reentrant):
    layer = layers(linear=lambda: nn.Linear(3, 4))["linear"]

    def slope(x):
        layer.weight.grad = None
        x = x.clone().requires_grad_()
        hidden = checkpoint(lambda x: F.dropout(layer(x)), x, use_reentrant=use_reentrant)
        F.dropout(hidden).square().sum().backward()
        return layer.weight.grad.clone()

    x = inputs(ROWS, 3)
    whole, recorded = record(slope, x)
    parts, draws = in_parts(slope, x, recorded)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-14)
    assert len(recorded.values) == 2  # not 3: what is drawn again is not another draw
    assert [one.unknown for one in draws] == [None, None]


def test_a_generator_of_the_users_own_is_handed_its_draws_and_set_back():
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()

    def noisy(x):
        return x + torch.randn(x.shape, generator=generator) + torch.randn(x.shape)

    x = inputs(ROWS, 3)
    whole, recorded = record(noisy, x)
    assert torch.equal(generator.get_state(), before)
    parts, draws = in_parts(noisy, x, recorded)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(generator.get_state(), before)
    assert [one.unknown for one in draws] == [None, None]


def test_draws_with_another_generator_in_the_same_state_are_other_draws():
    first, second = (torch.Generator().manual_seed(1) for _ in range(2))

    def noisy(x):
        return torch.randn(x.shape, generator=first) + 10 * torch.rand(x.shape, generator=second)

    x = inputs(ROWS, 3)
    whole, recorded = record(noisy, x)
    parts, _ = in_parts(noisy, x, recorded)
    assert len(recorded.values) == 2
    assert torch.equal(torch.cat(parts), whole)


UNKNOWN = {
    "randperm": lambda x: x[torch.randperm(len(x))],
    "multinomial": lambda x: x.gather(1, torch.multinomial(x, 1)),
    "rrelu_with_noise": lambda x: F.rrelu(x - 0.5, training=True),
    "rand": lambda x: torch.rand(len(x), len(x)).sum(1),  # a pair of rows
    "randn": lambda x: torch.randn(max(1, len(x) - 3)),
    "randint": lambda x: torch.randint(0, 9, (ROWS if len(x) == ROWS else 1,)),
    "bernoulli": lambda x: torch.bernoulli(x) if len(x) == ROWS else torch.rand_like(x),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_handed_to_rows_is_named(name):
    x = inputs(ROWS, 3)
    _, recorded = record(UNKNOWN[name], x)
    _, draws = run_part(UNKNOWN[name], x, recorded, SPLIT[0])
    assert draws.unknown == {"bernoulli": "rand_like"}.get(name, name)


@pytest.mark.parametrize("numbers", [(2, 1), (1, 2), (1, 0), (0, 1)], ids=str)
def test_a_part_with_another_number_of_draws_is_told(numbers):
    def function(x):
        for _ in range(numbers[0] if len(x) == ROWS else numbers[1]):
            x = x + torch.rand_like(x)
        return x

    x = inputs(ROWS, 3)
    _, recorded = record(function, x)
    _, draws = run_part(function, x, recorded, SPLIT[0])
    assert draws.unknown is not None


def test_a_record_does_not_change_what_is_drawn():
    def function(x):
        return F.dropout(torch.normal(x, 1.0)) + torch.rand_like(x)

    x = inputs(ROWS, 3)
    torch.manual_seed(3)
    expected, state = function(x), torch.get_rng_state()
    found, _ = record(function, x)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_record_keeps_its_numbers_when_they_are_changed_in_place():
    x = inputs(ROWS, 3)
    whole, recorded = record(lambda x: torch.rand_like(x).mul_(100).add_(1), x)
    parts, _ = in_parts(lambda x: torch.rand_like(x), x, recorded)
    torch.testing.assert_close(torch.cat(list(parts)) * 100 + 1, whole)


def test_the_floating_point_types_met_on_the_way_are_kept():
    _, recorded = record(lambda x: (x.float() * 2).double(), inputs(ROWS, 3))
    assert recorded.dtypes == {torch.float32, torch.float64}
    _, recorded = record(lambda x: (x > 0).long(), inputs(ROWS, 3))
    assert recorded.dtypes == set()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: F.batch_norm(x, None, None, training=True), True),
        (lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True), True),
        (lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), training=False), False),
        (lambda x: F.instance_norm(x[..., None].expand(-1, -1, 4)), False),
        (lambda x: F.group_norm(x, 3), False),
        (lambda x: F.layer_norm(x, (3,)), False),
    ],
)
def test_normalization_by_the_batch_is_seen(function, expected):
    _, recorded = record(function, inputs(ROWS, 3).float())
    assert recorded.uses_batch_norm is expected
