"""What the graph of a loss tells in a loop over a window: a weight that does not count what its mean is over."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import full_batch_gradient, gradients, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold.errors import NotDecomposableError


def net():
    return nn.Linear(4, 3).double()


def rows(*sizes):
    torch.manual_seed(4)
    return [(torch.randn(size, 4).double(), torch.randint(0, 3, (size,))) for size in sizes]


def texts(*lengths):
    """Per micro-batch the numbers of labels in each row of 6."""
    torch.manual_seed(5)
    found = []
    for of_rows in lengths:
        labels = torch.randint(0, 3, (len(of_rows), 6))
        for row, length in enumerate(of_rows):
            labels[row, length:] = -100
        found.append((torch.randn(len(of_rows), 6, 4).double(), labels))
    return found


def joined(parts):
    return tuple(torch.cat(leaves) for leaves in zip(*parts, strict=True))


def loop(parts, loss_fn, num_windows=1, **options):
    """Windows over the same micro-batches; the last gradient is that of the whole."""
    model = net()
    for window in gradfold.windows(parts * num_windows, len(parts), model=model, **options):
        model.zero_grad()
        for part in window:
            window.backward(loss_fn(model, part))
    expected = full_batch_gradient(model, lambda model: loss_fn(model, joined(parts)))
    assert relative_error(gradients(model), expected) <= 1e-12


def classify(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def regress(model, batch):
    return F.mse_loss(model(batch[0]), F.one_hot(batch[1], 3).double())


def by_hand(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none").sum() / len(batch[1])


def masked(model, batch):
    mask = (batch[1] >= 0).double()
    losses = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none")
    return (losses * mask).sum() / mask.sum()


def per_row(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none").mean()


@pytest.mark.parametrize("loss_fn", [classify, regress, by_hand, per_row, lambda *args: -2 * -classify(*args) / 3])
@pytest.mark.parametrize("sizes", [(2, 5, 3), (1, 1), (4,), (3, 1)])
def test_means_over_samples_pass_in_silence(loss_fn, sizes):
    loop(rows(*sizes), loss_fn, num_windows=5)


TEXTS = texts((2, 1, 4), (6, 5, 6), (1, 2, 1))


@pytest.mark.parametrize("loss_fn", [classify, masked])
@pytest.mark.parametrize("weight", [gradfold.token_count(1), lambda batch: int((batch[1] != -100).sum())])
def test_means_over_tokens_pass_with_their_weight(loss_fn, weight):
    loop(TEXTS, loss_fn, num_windows=5, weight=weight)


@pytest.mark.parametrize("loss_fn", [classify, masked])
def test_means_over_tokens_weighted_by_samples_are_refused_with_the_weight_to_write(loss_fn):
    with pytest.raises(NotDecomposableError, match=r"means over 7 and 17.*weight=gradfold\.token_count\(1\)") as caught:
        loop(TEXTS, loss_fn)
    assert (caught.value.cause, caught.value.weight) == ("weights", "gradfold.token_count(1)")


def test_a_weight_that_counts_something_else_is_refused():
    with pytest.raises(NotDecomposableError, match="weights are 18 and 18"):
        loop(TEXTS, classify, weight=lambda batch: batch[1].numel())


@pytest.mark.parametrize("sizes", [(2, 2), (2, 5)])
@pytest.mark.parametrize("factor", [1, 0.5])
def test_sums_are_refused(sizes, factor):
    def loss_fn(model, batch):
        loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        return loss if factor == 1 else loss * factor

    if factor == 1 or sizes[0] != sizes[1]:
        with pytest.raises(NotDecomposableError) as caught:
            loop(rows(*sizes), loss_fn)
        assert caught.value.cause == ("sum" if factor == 1 else "weights")


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda model, batch: classify(model, batch) + 1e-3 * model.weight.square().mean(),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], torch.tensor([1.0, 1, 1]).double()),
        lambda model, batch: model(batch[0]).logsumexp(1).exp().log().mean().exp().log(),
    ],
)
def test_what_a_graph_does_not_tell_is_said_once(loss_fn):
    with pytest.warns(RuntimeWarning, match=r"cannot see what this loss is a mean over.*Pass as weight=") as caught:
        loop(rows(2, 5), loss_fn, num_windows=5)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(rows(2, 5), loss_fn, num_windows=5, weight=lambda batch: len(batch[1]))  # said by the user


def test_later_windows_are_looked_at_too():
    model, parts = net(), texts((3, 3), (3, 3))
    uneven = texts((3, 3), (6, 6))
    with pytest.raises(NotDecomposableError):
        for number, window in enumerate(gradfold.windows([*parts * 7, *uneven], 2, model=model)):
            assert number <= 7
            for part in window:
                window.backward(classify(model, part))


def info_nce(model, batch):
    outputs = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(5 * outputs @ outputs.T, torch.arange(len(outputs)))


def barlow(model, batch):
    outputs = model(batch[0])
    return ((outputs.T @ outputs) / len(outputs) - torch.eye(3).double()).square().sum() / 9


@pytest.mark.parametrize("loss_fn", [info_nce, barlow])
def test_a_loss_that_compares_rows_is_warned_of_once(loss_fn):
    model, parts = net(), rows(4, 4, 4)
    with pytest.warns(RuntimeWarning, match="seems to compare the 4 rows of a micro-batch") as caught:
        for window in gradfold.windows(parts * 3, 3, model=model, weight=lambda batch: len(batch[1])):
            for part in window:
                window.backward(loss_fn(model, part))
    assert len(caught) == 1


def test_a_graph_behind_a_checkpoint_is_not_run_again():
    calls = []

    def head(inputs, labels):
        calls.append(1)
        return F.cross_entropy(inputs, labels)

    def loss_fn(model, batch):
        return checkpoint(head, model(batch[0]), batch[1], use_reentrant=False)

    model, parts = net(), rows(2, 2)
    (window,) = gradfold.windows(parts, 2, model=model, weight=lambda batch: len(batch[1]))
    for part in window:
        window.backward(loss_fn(model, part))
    assert len(calls) == 4, "forward, and again in the backward pass"
