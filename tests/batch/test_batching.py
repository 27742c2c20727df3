"""Rows that belong together: they stay in one micro-batch, and the gradient is the whole batch's."""

from __future__ import annotations

import math

import pytest
import torch
from processes import run, worlds
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold import Grouped, Stacked

F = nn.functional


def network(dropout=0.0):
    torch.manual_seed(0)
    layers = nn.Linear(3, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 1)
    return nn.Sequential(*layers).double()


def rows(total, seed=1):
    return torch.randn(total, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stacked_pairs(model, batch):
    """DPO's and a reward model's loss in TRL's layout: all chosen, then all rejected."""
    chosen, rejected = model(batch["x"]).squeeze(1).chunk(2)
    return -F.logsigmoid(chosen - rejected - 0.1).mean()


def next_pairs(model, batch):
    """The same with the rejected answer after each chosen one."""
    scores = model(batch["x"]).view(-1, 2)
    return -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()


def grpo(model, batch):
    """Four answers to a prompt; advantages within the group."""
    scores, rewards = model(batch["x"]).view(-1, 4), batch["reward"].view(-1, 4)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    return -(scores * advantages).mean()


def by_prompt(model, batch):
    """The same with any number of answers: runs of equal ids."""
    scores, ids = model(batch["x"]).squeeze(1), batch["prompt_id"]
    _, places, counts = ids.unique_consecutive(return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), dtype=scores.dtype).index_add(0, places, batch["reward"]) / counts
    return -(scores * (batch["reward"] - means[places])).mean()


def triplets(model, batch):
    anchor, near, far = model(batch["x"]).chunk(3)
    return (1 + (anchor - near).square() - (anchor - far).square()).relu().mean()


def batch_of(total, group=4):
    values = rows(total, seed=3)[:, 0]
    ids = torch.arange(total) // group
    return {"x": rows(total), "reward": values, "prompt_id": ids, "scale": torch.tensor(2.0)}


def runs(*lengths):
    return {
        "x": rows(sum(lengths)),
        "reward": rows(sum(lengths), seed=3)[:, 0],
        "prompt_id": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
    }


CASES = {  # loss, batching, batch, micro_batch_size, the sizes of micro-batches
    "DPO": (stacked_pairs, Stacked(2), batch_of(40), 16, [16, 16, 8]),
    "DPO, ragged": (stacked_pairs, Stacked(2), batch_of(14), 5, [4, 4, 4, 2]),
    "one pair at once": (stacked_pairs, Stacked(2), batch_of(6), 2, [2, 2, 2]),
    "pairs in turn": (next_pairs, Grouped(2), batch_of(40), 16, [16, 16, 8]),
    "pairs in turn, odd size": (next_pairs, Grouped(2), batch_of(10), 3, [2, 2, 2, 2, 2]),
    "GRPO": (grpo, Grouped(4), batch_of(20), 9, [8, 8, 4]),
    "GRPO by id": (by_prompt, Grouped("prompt_id"), runs(3, 1, 4, 2, 2, 1), 5, [4, 4, 5]),
    "triplets": (triplets, Stacked(3), batch_of(36), 16, [15, 15, 6]),
    "all at once": (stacked_pairs, Stacked(2), batch_of(10), None, [10]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("self_check", [False, True])
def test_the_gradient_is_that_of_the_whole_batch(name, self_check):
    loss_fn, batching, batch, size, sizes = CASES[name]
    seen = []

    def noted(model, batch):
        seen.append(len(batch["x"]))
        return loss_fn(model, batch), {"reward": batch["reward"], "mean": batch["reward"].mean()}

    model = network()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    accumulator = gradfold.Accumulator(model, noted, micro_batch_size=size, batching=batching, self_check=self_check)
    result = accumulator.backward(batch)
    assert relative_error(gradients(model), expected) < 1e-12
    assert seen[-len(sizes) :] == sizes and result.num_samples == len(batch["x"])
    assert torch.equal(result.metrics["reward"], batch["reward"])  # in the batch's own order
    assert math.isclose(result.metrics["mean"], batch["reward"].mean(), rel_tol=1e-12)


@pytest.mark.parametrize("name", ["DPO", "GRPO", "triplets", "GRPO by id"])
def test_the_proof(name):
    loss_fn, batching, batch, size, _ = CASES[name]
    accumulator = gradfold.Accumulator(network(), loss_fn, micro_batch_size=size, batching=batching)
    verdict = gradfold.verify(accumulator, batch)
    assert verdict.ok, str(verdict)


WRONG = {
    "no declaration": (stacked_pairs, None, 40, 16),
    "groups for blocks": (stacked_pairs, Grouped(4), 40, 16),
    "blocks for groups": (grpo, Stacked(4), 40, 12),
    "blocks for pairs in turn": (next_pairs, Stacked(2), 12, 6),
    "threes in turn for blocks": (triplets, Grouped(3), 36, 12),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_declaration_is_refused(name):
    """Rows that belong together are torn apart, which is neither silent nor an error of torch."""
    loss_fn, batching, total, size = WRONG[name]
    accumulator = gradfold.Accumulator(network(), loss_fn, micro_batch_size=size, batching=batching)
    with pytest.raises(gradfold.NotDecomposableError):
        accumulator.backward(batch_of(total))


def test_dropout_in_pairs_is_no_reason_to_refuse():
    model = network(dropout=0.5)
    accumulator = gradfold.Accumulator(model, stacked_pairs, micro_batch_size=8, batching=Stacked(2))
    assert accumulator.backward(batch_of(24)).num_micro_batches == 3


@pytest.mark.parametrize("name", ["DPO", "GRPO", "GRPO by id", "triplets"])
def test_memory_that_runs_out_halves_between_groups(name):
    loss_fn, batching, batch, _, _ = CASES[name]
    largest = 6

    def hungry(model, batch):
        if len(batch["x"]) > largest:
            raise torch.OutOfMemoryError("injected")
        return loss_fn(model, batch)

    model = network()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    accumulator = gradfold.Accumulator(model, hungry, micro_batch_size=None, batching=batching, self_check=False)
    result = accumulator.backward(batch)
    assert result.recoveries and relative_error(gradients(model), expected) < 1e-12
    model.zero_grad()
    accumulator.backward(batch)
    assert relative_error(gradients(model), expected) < 1e-12


def test_a_group_that_does_not_fit_is_named():
    def hungry(model, batch):
        if len(batch["x"]) > 3:
            raise torch.OutOfMemoryError("injected")
        return grpo(model, batch)

    accumulator = gradfold.Accumulator(network(), hungry, batching=Grouped(4), self_check=False)
    with pytest.raises(gradfold.DoesNotFitError, match="4 rows that belong together do not fit"):
        accumulator.backward(batch_of(12))


def test_samples_to_collate_are_groups_too():
    batch = runs(3, 1, 4, 2)
    samples = [{name: column[row] for name, column in batch.items()} for row in range(10)]
    model = network()
    expected = full_batch_gradient(model, lambda model: by_prompt(model, batch))
    accumulator = gradfold.Accumulator(
        model,
        by_prompt,
        micro_batch_size=4,
        batching=Grouped("prompt_id"),
        collate=torch.utils.data.default_collate,
    )
    assert accumulator.backward(samples).num_micro_batches == 3
    assert relative_error(gradients(model), expected) < 1e-12


def test_a_strided_column_in_a_window():
    """What tells whether a loader fills its memory again read a column of one element as bytes, and failed."""
    x = rows(6)
    assert len(list(gradfold.windows([x[:, 0], x[:1, 0]], 2))) == 1


def on_a_rank(rank, size, name):
    loss_fn, batching, batch, micro_batch_size, _ = CASES[name]
    model = nn.parallel.DistributedDataParallel(network())
    own = batching.take(batch, own_rows(batching, batch, rank, size))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=micro_batch_size, batching=batching)
    return gradients(model) if accumulator.backward(own) else None


def own_rows(batching, batch, rank, size):
    """Whole groups; the first rank has one more than its part."""
    groups = batching.groups(batch, len(batch["x"]))
    bounds = [0, *(len(groups) * number // size + 1 for number in range(1, size)), len(groups)]
    return sorted(row for group in groups[bounds[rank] : bounds[rank + 1]] for row in group)


@pytest.mark.parametrize("size", worlds(3))
@pytest.mark.parametrize("name", ["DPO", "GRPO", "triplets"])
def test_over_ranks(name, size):
    loss_fn, _, batch, _, _ = CASES[name]
    expected = full_batch_gradient(network(), lambda model: loss_fn(model, batch))
    for found in run(on_a_rank, size, name):
        found = {key.removeprefix("module."): one for key, one in found.items()}
        assert relative_error(found, expected) < 1e-12


def test_windows_of_several_batches():
    parts = [batch_of(12), batch_of(8)]
    model = network()

    def whole(model):
        return (12 * stacked_pairs(model, parts[0]) + 8 * stacked_pairs(model, parts[1])) / 20

    expected = full_batch_gradient(model, whole)
    accumulator = gradfold.Accumulator(model, stacked_pairs, micro_batch_size=5, batching=Stacked(2))
    (window,) = gradfold.windows(parts, 2)
    result = accumulator.backward(window)
    assert relative_error(gradients(model), expected) < 1e-12
    assert (result.num_micro_batches, result.num_samples) == (5, 20)


class Sequences(gradfold.Batching):
    """Sequences that are packed in one row: as many rows as `lengths`."""

    def num_rows(self, batch):
        return len(batch["lengths"])

    def groups(self, batch, total):
        return [(row,) for row in range(total)]

    def take(self, batch, rows):
        parts = batch["x"].split(batch["lengths"])
        return {"x": torch.cat([parts[row] for row in rows]), "lengths": [batch["lengths"][row] for row in rows]}


def test_a_batching_of_ones_own():
    def loss_fn(model, batch):
        return torch.stack([model(part).square().mean() for part in batch["x"].split(batch["lengths"])]).mean()

    batch, model = {"x": rows(11), "lengths": [3, 1, 5, 2]}, network()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=3, batching=Sequences())
    assert accumulator.backward(batch).num_micro_batches == 2
    assert relative_error(gradients(model), expected) < 1e-12


def test_auto_finds_a_size_for_whole_groups():
    model = network()
    expected = full_batch_gradient(model, lambda model: grpo(model, batch_of(32)))
    accumulator = gradfold.Accumulator(model, grpo, micro_batch_size="auto", batching=Grouped(4))
    accumulator.backward(batch_of(32))
    assert relative_error(gradients(model), expected) < 1e-12


@pytest.mark.parametrize(
    ("batching", "batch", "options", "message"),
    [
        (Grouped(4), batch_of(10), {}, "groups of 4 rows, and the batch has 10, so 2 are left"),
        (Stacked(3), batch_of(10), {}, "3 blocks of equal size, and the batch has 10 rows"),
        (Grouped(4), batch_of(8), {"micro_batch_size": 3}, "a group of 4 rows is larger than micro_batch_size=3"),
        (Grouped("id"), batch_of(8), {}, "finds no 'id' in a batch that is a dict"),
        (
            Grouped("prompt_id"),
            {**batch_of(4), "prompt_id": torch.tensor([0, 1, 0, 1])},
            {},
            "rows of one value do not follow each other",
        ),
    ],
)
def test_what_cannot_be_grouped_is_refused(batching, batch, options, message):
    accumulator = gradfold.Accumulator(network(), grpo, batching=batching, **options)
    with pytest.raises(gradfold.BatchError, match=message):
        accumulator.backward(batch)


@pytest.mark.parametrize("make", [lambda: Grouped(0), lambda: Grouped(2.0), lambda: Stacked(1), lambda: Stacked("a")])
def test_arguments_that_mean_nothing(make):
    with pytest.raises(gradfold.OptionError):
        make()


def test_groups_that_leave_rows_out():
    class Some(gradfold.Batching):
        def groups(self, batch, total):
            return [range(total - 1)]

    with pytest.raises(gradfold.BatchError, match="gave 7 rows for a batch of 8"):
        gradfold.Accumulator(network(), grpo, batching=Some()).backward(batch_of(8))
