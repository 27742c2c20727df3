"""A split: the sizes of micro-batches, in the batch's own order, without copies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.batch.split import MicroBatcher, check_size, cut_range, join_batches, split_rows, split_samples
from gradfold.errors import BatchError, GradfoldError, OptionError


@settings(max_examples=200, deadline=None, derandomize=True)
@given(total=st.integers(1, 300), size=st.integers(1, 320))
def test_the_parts_are_as_few_as_possible_and_cover_the_rows_in_order(total, size):
    parts, even = cut_range(total, size), cut_range(total, size, is_even=True)
    for found in (parts, even):
        sizes = [len(part) for part in found]
        assert len(found) == math.ceil(total / size)
        assert max(sizes) <= size and min(sizes) >= 1 and sizes == sorted(sizes, reverse=True)
        assert [row for part in found for row in part] == list(range(total))
    assert {len(part) for part in parts[:-1]} <= {size}
    assert max(map(len, even)) - min(map(len, even)) <= 1


@pytest.mark.parametrize(
    "total, size, sizes",
    [
        (33, 5, [5, 5, 5, 5, 5, 5, 3]),
        (40, 16, [16, 16, 8]),
        (33, 32, [32, 1]),
        (33, 33, [33]),
        (33, 1, [1] * 33),
        (1, 1, [1]),
        (5, 99, [5]),
    ],
)
def test_some_splits_by_hand(total, size, sizes):
    assert [len(part) for part in cut_range(total, size)] == sizes


def test_no_size_means_no_cut():
    assert list(cut_range(7, None)) == [range(7)]


@pytest.mark.parametrize("size", [None, 1, 16, 10**9])
def test_sizes_that_work(size):
    check_size(size)


@pytest.mark.parametrize("size, words", [(0, "=0"), (-1, "=-1"), (2.0, "float"), (True, "bool"), ("8", "str")])
def test_sizes_that_cannot_work_say_what_was_given_and_expected(size, words):
    with pytest.raises(OptionError, match=r"at least 1") as caught:
        check_size(size)
    assert words in str(caught.value) and "micro_batch_size" in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_micro_batches_are_views_and_know_their_rows():
    inputs = torch.arange(14.0).reshape(7, 2)
    parts = split_rows({"x": inputs, "scale": 2}, 3)
    assert [part.rows for part in parts] == [range(0, 3), range(3, 6), range(6, 7)]
    for part in parts:
        assert part.data["x"].data_ptr() == inputs[part.rows.start].data_ptr()
        assert torch.equal(part.data["x"], inputs[part.rows.start : part.rows.stop]) and part.data["scale"] == 2


def counted(batch):
    batch["calls"] += 1
    return batch["x"] * batch["calls"]


def scaled(batch):
    batch["nested"]["scale"].mul_(2)
    return batch["x"] * batch["nested"]["scale"]


@pytest.mark.parametrize("write", [counted, scaled])
@pytest.mark.parametrize("fault", [None, "out of memory"])
def test_each_micro_batch_may_write_to_a_0_d_tensor_as_the_whole_batch_may(write, fault):
    """What one micro-batch writes, the next one does not see; nor does a micro-batch that runs again."""

    def batch():
        torch.manual_seed(1)
        return {"x": torch.randn(8, 2).double(), "calls": torch.zeros(()), "nested": {"scale": torch.ones(()).double()}}

    num_calls = 0

    def loss_fn(model, batch):
        nonlocal num_calls
        num_calls += 1
        loss = model(write(batch)).square().mean()
        if fault and num_calls == 4:
            raise torch.OutOfMemoryError("no memory")
        return loss

    model = nn.Linear(2, 1).double()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, self_check=False)
    if fault:  # a rerun on what was written would not be the same
        with pytest.raises(GradfoldError, match="in place"):
            accumulator.backward(batch())
        return
    accumulator.backward(batch())
    expected = full_batch_gradient(model, lambda model: model(write(batch())).square().mean())
    assert relative_error(gradients(model), expected) <= 1e-12


def test_a_batch_that_fits_is_handed_on_itself():
    batch = (torch.zeros(3),)
    (part,) = split_rows(batch, 3)
    assert part.data is batch and part.rows == range(3)


@pytest.mark.parametrize("batch", [(torch.zeros(3), torch.zeros(2)), {"x": object()}, (torch.zeros(3), ["a", "b"])])
def test_nothing_is_asked_of_a_batch_that_is_not_cut_but_a_weight(batch):
    (part,) = split_rows(batch, None)
    assert part.data is batch and not part.is_counted
    with pytest.raises(BatchError):
        split_rows(batch, 2)
    with pytest.raises(BatchError, match=r"weight=.samples. needs its number of rows.*weight=lambda"):
        MicroBatcher(None, counts_samples=True).split(batch)


def test_samples_are_collated_once_per_part_in_order():
    calls = []

    def collate(samples):
        assert type(samples) is list
        calls.append(samples)
        return torch.tensor(samples)

    parts = split_samples(tuple(range(7)), 3, collate)
    assert calls == [[0, 1, 2], [3, 4, 5], [6]]
    assert [part.data.tolist() for part in parts] == calls
    assert [part.rows for part in parts] == [range(0, 3), range(3, 6), range(6, 7)]


def test_samples_may_be_of_any_kind_and_size():
    parts = split_samples([torch.zeros(n) for n in (4, 1, 2)], 2, nn.utils.rnn.pad_sequence)
    assert [tuple(part.data.shape) for part in parts] == [(4, 2), (2, 1)]


@pytest.mark.parametrize(
    "samples, words",
    [
        ([], "empty list of samples"),
        ((), "Skip empty batches"),
        ("words", "got a str"),
        (b"words", "got a bytes"),
        (torch.zeros(3), "got a Tensor"),
        ({"x": 1}, "got a dict"),
        (iter([1]), "collate_fn=list"),
        (None, "got a NoneType"),
    ],
)
def test_what_is_no_list_of_samples_is_refused(samples, words):
    with pytest.raises(BatchError, match=words):
        split_samples(samples, 2, list)


def test_joined_batches_number_their_rows_on():
    joined = join_batches([split_rows(torch.zeros(5), 3), split_rows(torch.zeros(1), 3), split_rows(torch.zeros(4), 2)])
    assert [part.rows for part in joined] == [range(0, 3), range(3, 5), range(5, 6), range(6, 8), range(8, 10)]


def test_joining_leaves_what_was_joined_as_it_was():
    second = split_rows(torch.zeros(4), 2)
    join_batches([split_rows(torch.zeros(5), 3), second])
    assert [part.rows for part in second] == [range(0, 2), range(2, 4)]


def collate_what_is_there(samples):
    """The usual way to skip samples that could not be read."""
    return torch.utils.data.default_collate([sample for sample in samples if sample is not None])


def test_samples_that_collate_leaves_out_do_not_count_or_are_refused():
    model = nn.Linear(2, 1).double()
    samples = [(torch.randn(2).double(), torch.randn(1).double()) for _ in range(7)]
    samples[1] = samples[2] = None

    def loss_fn(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    expected = full_batch_gradient(model, lambda model: loss_fn(model, collate_what_is_there(samples)))
    try:
        gradfold.Accumulator(model, loss_fn, micro_batch_size=3, collate=collate_what_is_there).backward(samples)
    except BatchError:
        return
    assert relative_error(gradients(model), expected) < 1e-12


def test_samples_are_split_and_weighed_as_the_batch_that_they_make():
    model = nn.Linear(2, 1).double()
    samples = [(torch.randn(2).double(), torch.randn(1).double() + 1e4) for _ in range(7)]

    def loss_fn(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    collate = torch.utils.data.default_collate
    expected = full_batch_gradient(model, lambda model: loss_fn(model, collate(samples)))
    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=3, collate=collate).backward(samples)
    assert relative_error(gradients(model), expected) < 1e-12
    assert (result.num_micro_batches, result.num_samples) == (3, 7)
