"""A length plan is the cheapest one: held against the exact programme, row by row."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradfold.errors import OptionError
from gradfold.packing.packer import StepCost, plan

settings.register_profile("gradfold", deadline=None, max_examples=150, derandomize=True)
settings.load_profile("gradfold")


def least_cost(lengths, max_tokens, cost):
    """The exact programme: of all ways to cut the sorted rows the cheapest, tried one by one."""
    ordered = sorted((max(1, length) for length in lengths), reverse=True)
    least = [0.0] * (len(ordered) + 1)
    for start in reversed(range(len(ordered))):
        reach = max(1, max_tokens // ordered[start])
        ends = range(start + 1, min(start + reach, len(ordered)) + 1)
        least[start] = min(cost.of(end - start, [ordered[start]]) + least[end] for end in ends)
    return least[0]


def cost_of(groups, columns, cost):
    return sum(cost.of(len(rows), [max(1, *(column[row] for row in rows)) for column in columns]) for rows in groups)


def padded(groups, columns):
    return [len(rows) * sum(max(1, *(column[row] for row in rows)) for column in columns) for rows in groups]


def check_groups(groups, columns, max_tokens):
    """Every row once, within the budget unless alone."""
    assert sorted(row for rows in groups for row in rows) == list(range(len(columns[0])))
    for rows, tokens in zip(groups, padded(groups, columns), strict=True):
        assert tokens <= max_tokens or len(rows) == 1


def lognormal(num, sigma, seed=0, median=150, longest=2048):
    generator = random.Random(seed)
    return [min(longest, max(1, int(generator.lognormvariate(math.log(median), sigma)))) for _ in range(num)]


costs = st.builds(StepCost, st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e7]), st.sampled_from([0.0, 0.01]))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=80), st.integers(1, 300), costs)
def test_a_plan_is_the_cheapest_of_all(lengths, max_tokens, cost):
    groups = plan([torch.tensor(lengths)], max_tokens, cost)
    check_groups(groups, [lengths], max_tokens)
    assert cost_of(groups, [lengths], cost) == pytest.approx(least_cost(lengths, max_tokens, cost), rel=1e-9)


@pytest.mark.parametrize("sigma", [0.6, 1.0])
@pytest.mark.parametrize("overhead", [16, 2000])
def test_4096_rows_are_planned_within_half_a_percent_of_the_optimum(sigma, overhead):
    lengths, cost = lognormal(4096, sigma), StepCost(overhead)
    groups = plan([torch.tensor(lengths)], 8192, cost)
    check_groups(groups, [lengths], 8192)
    assert cost_of(groups, [lengths], cost) <= 1.005 * least_cost(lengths, 8192, cost)


@pytest.mark.parametrize("sigma", [0.6, 1.0])
def test_hardly_any_padding_is_left(sigma):
    """256 rows; the greedy token budget fills each micro-batch, in order of length."""
    for seed in range(10):
        lengths = lognormal(256, sigma, seed)
        real = sum(lengths)
        planned = sum(padded(plan([torch.tensor(lengths)], 8192, StepCost(64)), [lengths]))
        at_random = sum(padded([range(start, start + 16) for start in range(0, 256, 16)], [lengths]))
        greedy = sum(padded(greedily(lengths, 8192), [lengths]))
        assert 1 - real / planned < 0.05 < 0.1 < 1 - real / greedy < 0.4 < 1 - real / at_random


def greedily(lengths, max_tokens):
    """As many of the shortest rows as fit, and so on: what trainers do."""
    groups = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups[-1] and (len(groups[-1]) + 1) * lengths[row] > max_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def test_the_longest_rows_come_first():
    assert plan([torch.tensor([3, 9, 1, 9, 3, 2])], 18, StepCost(0.5)) == [(1, 3), (0, 4), (5,), (2,)]


def test_dear_micro_steps_are_few_and_free_ones_leave_no_padding():
    lengths = [5, 4, 3, 2, 1]
    assert len(plan([torch.tensor(lengths)], 25, StepCost(1e6))) == 1
    assert len(plan([torch.tensor(lengths)], 25, StepCost(0))) == 5


def test_attention_makes_long_rows_shorter_company():
    lengths = [100, 98, 96, 94]
    assert len(plan([torch.tensor(lengths)], 400, StepCost(20))) == 1
    assert len(plan([torch.tensor(lengths)], 400, StepCost(20, attention=0.1))) > 1


pairs = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=60)


@given(pairs, st.integers(1, 400), costs)
def test_rows_with_two_lengths_are_cut_as_well_as_their_order_allows(lengths, max_tokens, cost):
    columns = [list(column) for column in zip(*lengths, strict=True)]
    groups = plan([torch.tensor(column) for column in columns], max_tokens, cost)
    check_groups(groups, columns, max_tokens)
    if max_tokens * len(lengths) < 32 * sum(max(1, one) + max(1, other) for one, other in lengths):
        order = [row for rows in groups for row in rows]  # fewer than 32 at once: every row may be an end
        assert cost_of(groups, columns, cost) == pytest.approx(
            least_in_order(order, columns, max_tokens, cost), rel=1e-9
        )


def least_in_order(order, columns, max_tokens, cost):
    least = [0.0] * (len(order) + 1)
    for start in reversed(range(len(order))):
        ends = []
        for end in range(start + 1, len(order) + 1):
            rows = order[start:end]
            if end > start + 1 and padded([rows], columns)[0] > max_tokens:
                break
            ends.append(cost_of([rows], columns, cost) + least[end])
        least[start] = min(ends)
    return least[0]


def test_many_rows_with_two_lengths_are_within_reach_of_every_cut():
    generator = random.Random(0)
    source = [min(60, max(3, int(generator.gauss(12, 4)))) for _ in range(400)]
    target = [max(3, length + generator.randint(-3, 3)) for length in source]
    columns = [source, target]
    groups = plan([torch.tensor(column) for column in columns], 4096, StepCost(64))
    check_groups(groups, columns, 4096)
    order = [row for rows in groups for row in rows]
    exact = least_in_order(order, columns, 4096, StepCost(64))
    assert cost_of(groups, columns, StepCost(64)) <= 1.02 * exact


@pytest.mark.parametrize(
    "arguments", [{"overhead": -1}, {"overhead": math.nan}, {"attention": math.inf}, {"overhead": "a"}]
)
def test_a_cost_is_a_finite_number(arguments):
    with pytest.raises(OptionError, match=r"StepCost\(.*expected a finite number of padded tokens, at least 0"):
        StepCost(**arguments)
