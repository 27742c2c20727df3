"""Which parts the self-check compares: those that a micro-batch could be, before anything is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.errors import NotDecomposableError


def net():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def rows(num_rows=16):
    torch.manual_seed(3)
    return torch.randn(num_rows, 5).double()


def preferences(scores):
    chosen, rejected = scores
    return -F.logsigmoid(chosen - rejected).mean()


def chosen_then_rejected(model, batch):
    """All chosen, then all rejected, as TRL stacks them."""
    return preferences(model(batch).sum(1).chunk(2))


def views(model, batch):
    """Two views of each image, all first ones before all second ones: SimCLR without negatives."""
    first, second = F.normalize(model(batch), dim=1).chunk(2)
    return (1 - (first * second).sum(1)).mean()


def triplets(model, batch):
    anchor, positive, negative = model(batch).chunk(3)
    return F.triplet_margin_loss(anchor, positive, negative, margin=5.0)


def contrastive(model, batch):
    outputs = F.normalize(model(batch), dim=1)
    others = outputs @ outputs.T - 1e3 * torch.eye(len(batch), dtype=batch.dtype)
    return F.cross_entropy(5 * others, torch.arange(len(batch)).roll(1))


def neighbors(model, batch):
    """Rows 2i and 2i + 1 are a pair."""
    scores = model(batch).sum(1)
    return preferences((scores[::2], scores[1::2]))


def groups_of_four(model, batch):
    """Rows 4i to 4i + 3 are the answers to one prompt, compared with their mean."""
    scores = model(batch).sum(1).view(-1, 4)
    return (scores - scores.mean(1, keepdim=True)).square().sin().mean()


@pytest.mark.parametrize("loss_fn", [chosen_then_rejected, views])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_blocks_that_are_stacked_are_proved_wrong(loss_fn, size):
    model = net()
    with pytest.raises(NotDecomposableError, match="depend on each other") as caught:
        gradfold.Accumulator(model, loss_fn, micro_batch_size=size).backward(rows())
    assert caught.value.cause == "coupled" and not gradients(model)


@pytest.mark.parametrize("size", [3, 6, 9])
def test_stacked_triplets_are_proved_wrong(size):
    with pytest.raises(NotDecomposableError, match="depend on each other"):
        gradfold.Accumulator(net(), triplets, micro_batch_size=size).backward(rows(18))


@pytest.mark.parametrize("loss_fn, sizes", [(neighbors, (2, 4, 8)), (groups_of_four, (4, 8))])
def test_groups_that_no_micro_batch_cuts_are_right(loss_fn, sizes):
    """No part that the self-check makes by itself convicts: a pair in halves is NaN, or compares other rows."""
    batch = rows()
    expected = full_batch_gradient(net_ := net(), lambda model: loss_fn(model, batch))
    for size in sizes:
        net_.zero_grad()
        gradfold.Accumulator(net_, loss_fn, micro_batch_size=size).backward(batch)  # a warning is an error
        assert relative_error(gradients(net_), expected) <= 1e-12


def test_groups_that_micro_batches_cut_are_refused():
    with pytest.raises(NotDecomposableError):
        gradfold.Accumulator(net(), neighbors, micro_batch_size=3).backward(rows(12))


def scaled(model, batch):
    """`scale` has as many entries as the batch has rows, by accident."""
    return F.mse_loss(model[0](batch["x"] * batch["scale"]), batch["y"])


def token_mean(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def tokens():
    targets = torch.randint(0, 3, (6, 4))
    for row in range(6):
        targets[row, 1 + row % 4 :] = -100
    return torch.randn(6, 4, 5).double(), targets


def test_a_coupled_loss_is_refused_one_row_at_a_time():
    with pytest.raises(NotDecomposableError, match="depend on each other"):
        gradfold.Accumulator(net(), contrastive, micro_batch_size=1).backward(rows(6))


def test_a_wrong_weight_is_refused_one_row_at_a_time():
    with pytest.raises(NotDecomposableError, match="token_count") as caught:
        gradfold.Accumulator(net(), token_mean, micro_batch_size=1).backward(tokens())
    assert caught.value.cause == "weights"


def test_a_tensor_that_has_as_many_entries_by_accident_is_warned_of_one_row_at_a_time():
    model = nn.Sequential(nn.Linear(5, 4)).double()
    batch = {"x": rows(5), "scale": torch.rand(5).double() + 0.5, "y": torch.randn(5, 4).double()}
    with pytest.warns(RuntimeWarning, match="fails on them together"):
        gradfold.Accumulator(model, scaled, micro_batch_size=1).backward(batch)


@pytest.mark.parametrize("dropout", [False, True])
def test_what_is_right_is_right_one_row_at_a_time(dropout):
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5) if dropout else nn.Tanh(), nn.Linear(4, 3)).double()
    batch = rows(6), torch.randn(6, 3).double()
    loss_fn = lambda model, batch: F.mse_loss(model(batch[0]), batch[1])  # noqa: E731
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    gradfold.Accumulator(model, loss_fn, micro_batch_size=1).backward(batch)
    if not dropout:
        assert relative_error(gradients(model), expected) <= 1e-12


class Padded:
    """Images of several sizes, padded to the largest of those that are collated together."""

    def __init__(self, sizes, fills_with_zeros):
        torch.manual_seed(2)
        self.samples = [(torch.randn(2, size).double(), torch.tensor(size % 3)) for size in sizes]
        self.fills_with_zeros = fills_with_zeros

    def collate(self, samples):
        width = max(image.shape[1] for image, _ in samples)
        images = torch.stack([F.pad(image, (0, width - image.shape[1])) for image, _ in samples])
        masks = torch.stack([F.pad(torch.ones_like(image), (0, width - image.shape[1])) for image, _ in samples])
        return images, masks, torch.stack([label for _, label in samples])

    def loss_fn(self, model, batch):
        images, masks, labels = batch
        hidden = model[0](images).tanh()
        means = hidden.mean(2) if self.fills_with_zeros else (hidden * masks[:, :1]).sum(2) / masks[:, :1].sum(2)
        return F.cross_entropy(model[1](means), labels)


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4, 7, 7, 9, 9), (9, 9, 4, 4), (4, 4, 4, 9)])
@pytest.mark.parametrize("size", [2, 1])
def test_padding_that_the_first_micro_batch_does_not_have_is_found(sizes, size):
    """A sampler that sorts by length makes the first micro-batch of one length."""
    model = nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Linear(4, 3)).double()
    wrong, right = (Padded(sizes, fills_with_zeros=one) for one in (True, False))
    options = {"micro_batch_size": size, "collate": wrong.collate}
    with pytest.raises(NotDecomposableError, match="padding"):
        gradfold.Accumulator(model, wrong.loss_fn, **options).backward(wrong.samples)
    accumulator = gradfold.Accumulator(model, right.loss_fn, **options)
    accumulator.backward(right.samples)
    expected = full_batch_gradient(model, lambda model: right.loss_fn(model, right.collate(right.samples)))
    assert relative_error(gradients(model), expected) <= 1e-12


def test_a_whole_that_does_not_fit_in_memory_leaves_it_undecided():
    def loss_fn(model, batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("no memory")
        return model(batch).square().mean()

    model, batch = net(), rows(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradfold.Accumulator(model, loss_fn, micro_batch_size=1).backward(batch)
    expected = full_batch_gradient(model, lambda model: model(batch).square().mean())
    assert relative_error(gradients(model), expected) <= 1e-12


def test_parts_are_weighed_as_they_are_collated():
    """Three images of three channels were cut along the channels, for their weight."""
    torch.manual_seed(0)
    samples = [torch.randn(3, height, 8).double() for height in (6, 9, 12, 7, 8, 11)]

    def loss_fn(model, images):
        return torch.cat([model(one[..., None]).square().sum(0).mean(-1).flatten() for one in images]).mean()

    model = nn.Linear(1, 2).double()
    accumulator = gradfold.Accumulator(
        model, loss_fn, micro_batch_size=3, collate=tuple, weight=lambda images: sum(one.numel() for one in images)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulator.backward(samples)
    expected = full_batch_gradient(model, lambda model: loss_fn(model, tuple(samples)))
    assert relative_error(gradients(model), expected) <= 1e-12
