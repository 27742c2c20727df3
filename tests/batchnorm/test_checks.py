"""Exact BatchNorm over something that is no row of the batch: counted once, or refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from reference import gradients, relative_error
from torch import nn
from torch.nn import functional as F

import gradfold
from gradfold.batch.nesting import structure
from gradfold.batchnorm.checks import InputDependence
from gradfold.batchnorm.moments import Moments
from gradfold.self_check.observations import Observations


@pytest.fixture(autouse=True)
def in_float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def squares(model, batch):
    return model(batch).square().mean()


def assert_exact(model, batch, loss_fn=squares, whole=None, **options):
    expected = copy.deepcopy(model)
    loss_fn(expected, batch if whole is None else whole).backward()
    gradfold.Accumulator(model, loss_fn, batch_norm="exact", **options).backward(batch)
    assert relative_error(gradients(model), gradients(expected)) < 1e-12
    for (name, found), wanted in zip(model.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=name)


class Prototypes(nn.Module):
    """Rows held against normalized prototypes, which every micro-batch brings along."""

    def __init__(self, count=6, together=False):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(count, 4))
        self.linear, self.own, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.together = together

    def forward(self, x):
        x = self.own(self.linear(x))
        if self.together:
            both = self.norm(torch.cat([x, self.prototypes]))
            return both[: len(x)] @ both[len(x) :].T
        return x @ self.norm(self.prototypes).T


@pytest.mark.parametrize("size", [4, 5, 6, 12])
def test_prototypes_count_once(size):
    """Their running variance was that of a sample as many times as large as there are micro-batches: 0.7 % off."""
    assert_exact(Prototypes(), torch.randn(12, 4), micro_batch_size=size)


def test_prototypes_count_once_where_micro_batches_show_it_though_the_self_check_has_not():
    assert_exact(Prototypes(), torch.randn(13, 4), micro_batch_size=4, self_check=False)


def test_prototypes_that_the_self_check_has_not_seen_are_warned_of_once():
    accumulator = gradfold.Accumulator(Prototypes(), squares, batch_norm="exact", micro_batch_size=4, self_check=False)
    with pytest.warns(RuntimeWarning, match="BatchNorm in norm got the same mean and variance in every micro-batch"):
        accumulator.backward(torch.randn(12, 4))
    accumulator.backward(torch.randn(12, 4))


def test_one_prototype_has_no_variance_in_the_whole_batch_either():
    accumulator = gradfold.Accumulator(Prototypes(1), squares, batch_norm="exact", micro_batch_size=4)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        accumulator.backward(torch.randn(12, 4))


def test_prototypes_beside_rows_are_refused():
    """Every micro-batch brought them into the statistics: gradients 42 % off."""
    accumulator = gradfold.Accumulator(Prototypes(together=True), squares, batch_norm="exact", micro_batch_size=3)
    for _ in range(3):  # however often it is tried
        with pytest.raises(
            gradfold.BatchNormError, match=r"BatchNorm in norm normalizes 9 values .* of 3 rows, and"
        ) as e:
            accumulator.backward(torch.randn(12, 4))
        assert e.value.layers == ("norm",)


class Grid(nn.Module):
    """A learned picture, the same in every row of the batch, and so a row of it."""

    def __init__(self):
        super().__init__()
        self.picture, self.conv, self.norm = (
            nn.Parameter(torch.randn(1, 2, 3, 3)),
            nn.Conv2d(2, 4, 1),
            nn.BatchNorm2d(4),
        )
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        seen = self.norm(self.conv(self.picture.expand(len(x), -1, -1, -1))).tanh()
        return self.linear(x) + seen.mean((2, 3))


def test_one_thing_in_every_row_is_counted_for_every_row():
    for size in (4, 5):
        assert_exact(Grid(), torch.randn(12, 4), micro_batch_size=size)


class Speech(nn.Module):
    """BatchNorm over time, padding included or left out."""

    def __init__(self, is_masked=False, dropout=0.0):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(4, 1)
        self.is_masked = is_masked

    def forward(self, batch):
        mask = batch["mask"]
        hidden = self.conv(batch["x"])
        if self.is_masked:
            steps = hidden.transpose(1, 2)
            steps = steps.masked_scatter(mask[..., None], self.norm(steps[mask]))
            hidden = steps.transpose(1, 2)
        else:
            hidden = self.norm(hidden)
        hidden = self.dropout(hidden).tanh() * mask[:, None]
        return self.last(hidden.sum(-1) / mask.sum(-1, keepdim=True))


LENGTHS = (7, 3, 5, 2, 6, 4, 1, 3)


def collate(samples):
    longest = max(sample.shape[1] for sample in samples)
    return {
        "x": torch.stack([F.pad(sample, (0, longest - sample.shape[1])) for sample in samples]),
        "mask": torch.stack([torch.arange(longest) < sample.shape[1] for sample in samples]),
    }


def samples():
    return [torch.randn(2, length) for length in LENGTHS]


def test_padding_to_the_longest_of_a_micro_batch_is_refused():
    """The whole batch has more of it in its statistics: gradients 131 % off."""
    accumulator = gradfold.Accumulator(Speech(), squares, batch_norm="exact", micro_batch_size=3, collate=collate)
    with pytest.raises(gradfold.BatchNormError, match=r"BatchNorm in norm normalizes \d+ .* pad to one length"):
        accumulator.backward(samples())


def test_padding_behind_dropout_is_refused():
    """The parts of one micro-batch have its padding; a short and a long one together have more."""
    model = Speech(dropout=0.5)
    accumulator = gradfold.Accumulator(model, squares, batch_norm="exact", micro_batch_size=3, collate=collate)
    with pytest.raises(gradfold.BatchNormError, match="pad to one length"):
        accumulator.backward(samples())


def test_padding_that_cannot_be_tried_is_warned_of():
    """With dropout, and one row at a time."""
    model = Speech(dropout=0.5)
    accumulator = gradfold.Accumulator(model, squares, batch_norm="exact", micro_batch_size=1, collate=collate)
    with pytest.warns(RuntimeWarning, match=r"normalizes 1 values per channel for each row .* and 7 for"):
        accumulator.backward(samples())


@pytest.mark.parametrize("size", [2, 3])
def test_a_mask_that_leaves_padding_out_is_fine(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = samples()
        assert_exact(Speech(True), batch, whole=collate(batch), micro_batch_size=size, collate=collate)


def test_pictures_of_several_sizes_in_a_loader_s_micro_batches_are_fine():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    parts = [torch.randn(3, 2, 4, 4), torch.randn(3, 2, 6, 5)]
    (window,) = gradfold.windows(parts, 2)
    gradfold.Accumulator(model, squares, batch_norm="exact").backward(window)
    values = torch.cat([model[0](part).transpose(0, 1).flatten(1) for part in parts], 1)
    torch.testing.assert_close(model[1].running_var, 0.9 + 0.1 * values.var(1), rtol=1e-12, atol=0)


def test_one_thing_that_is_not_the_same_everywhere_is_refused():
    normalized = InputDependence(is_collated=False)
    for rows in (3, 1, 2):
        normalized.note(torch.ones(rows), [("norm", 5)])
    normalized.judge(True)
    parts = [Moments(torch.zeros(4), torch.ones(4) * scale, 5) for scale in (1, 2)]
    assert normalized.is_shared((structure(torch.ones(1)), 0, "norm"), parts[:1] * 2, [])
    with pytest.raises(gradfold.BatchNormError, match=r"normalizes 5 values .* not the same in every micro-batch"):
        normalized.is_shared((structure(torch.ones(1)), 0, "norm"), parts, [])


def test_the_same_call_may_be_another_for_other_batches():
    """What is known of a call for one kind of batch is not taken for the other's."""

    def loss_fn(model, batch):
        if isinstance(batch, tuple):
            return model.norm(model.linear(batch[0])).square().mean()
        return (model.linear(batch) @ model.norm(model.prototypes).T).square().mean()

    model, expected = Prototypes(), Prototypes()
    expected.load_state_dict(model.state_dict())
    accumulator = gradfold.Accumulator(model, loss_fn, batch_norm="exact", micro_batch_size=4)
    for seed in range(2):
        rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))
        for batch in (rows, (rows,)):
            model.zero_grad(), expected.zero_grad()
            accumulator.backward(batch)
            loss_fn(expected, batch).backward()
            if isinstance(batch, tuple):
                assert float(gradients(model)["linear.bias"].abs().max()) < 1e-12  # BatchNorm takes it out
            else:
                assert relative_error(gradients(model), gradients(expected)) < 1e-12
            torch.testing.assert_close(model.norm.running_var, expected.norm.running_var, rtol=1e-12, atol=0)


@pytest.mark.parametrize("order", [(3, 1, 2), (3, 2, 1), (7, 3, 1, 2), (3, 3, 1, 2)])
def test_runs_that_belong_together_are_found(order):
    runs = Observations()
    for rows in order:
        runs.note(rows, f"{rows} rows")
    found = runs.take()
    assert found[0].seen == "3 rows" and sorted(part.num_rows for part in found[1:]) == [1, 2]
    assert runs.take() is None


def test_runs_whose_rows_cannot_be_counted_belong_to_no_observation():
    runs = Observations()
    for rows in (3, None, 1, 2):
        runs.note(rows, "")
    assert runs.take() is None
