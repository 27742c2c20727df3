"""What a loss's graph says: means, sums and what they were divided by, held against the gradient itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gradfold.doctor.graph_stats import graph_stats
from gradfold.engine.loss_graph import mark, terms_of

X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 0, -100])
TARGETS = torch.rand(6, 4, generator=torch.Generator().manual_seed(2))


def logits():
    torch.manual_seed(0)
    return nn.Linear(5, 4)(X)


MEANS = {
    "cross entropy": (lambda z: F.cross_entropy(z, LABELS), 5),
    "negative log-likelihood": (lambda z: F.nll_loss(F.log_softmax(z, dim=1), LABELS), 5),
    "squared error": (lambda z: F.mse_loss(z, TARGETS), 24),
    "huber": (lambda z: F.huber_loss(z, TARGETS), 24),
    "binary cross entropy": (lambda z: F.binary_cross_entropy_with_logits(z, TARGETS), 24),
    "absolute error": (lambda z: F.l1_loss(z, TARGETS), 24),
    "by hand": (lambda z: z.square().mean(), 24),
}


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize(
    ("divide", "scale"),
    [
        (lambda loss: loss, 1.0),
        (lambda loss: loss / 4, 0.25),
        (lambda loss: loss.div_(4), 0.25),
        (lambda loss: loss * 0.25, 0.25),
        (lambda loss: 0.25 * loss.squeeze(), 0.25),
        (lambda loss: (loss / 2).double() / 2, 0.25),
        (lambda loss: -loss, -1.0),
        (lambda loss: loss / torch.tensor(8.0), 0.125),
    ],
)
def test_a_mean_and_its_scale(name, divide, scale):
    loss_of, count = MEANS[name]
    (term,) = terms_of(divide(loss_of(logits())), None)
    assert (term.reduction, float(term.count)) == ("mean", count)
    assert term.scale == pytest.approx(scale)


def test_the_scale_is_the_gradient_of_the_loss_with_respect_to_the_mean():
    """The naive check: divide the gradient of the whole expression by that of the mean alone."""
    weight = torch.ones(3, requires_grad=True)
    mean = (weight * torch.tensor([1.0, 2.0, 3.0])).mean()
    loss = -(mean * 6 / 4) + 0.0
    (term,) = terms_of(loss, torch.tensor(0.5))
    (of_mean,) = torch.autograd.grad(mean, weight, retain_graph=True)
    loss.backward(torch.tensor(0.5))
    assert term.scale == pytest.approx(float(weight.grad[0] / of_mean[0]))


def test_sums_and_several_terms():
    z = logits()
    (total,) = terms_of(F.cross_entropy(z, LABELS, reduction="sum") / 32, None)
    assert (total.reduction, float(total.count), total.divisors[0].value) == ("sum", 5, 32)
    first, second = sorted(
        terms_of((F.mse_loss(z, TARGETS) + 0.1 * z.square().mean()) / 2, None), key=lambda t: t.scale
    )
    assert (first.scale, second.scale) == (pytest.approx(0.05), pytest.approx(0.5))
    assert {divisor.num_terms for divisor in second.divisors} == {2}
    (unknown,) = terms_of(z.logsumexp(0).logsumexp(0), None)
    assert unknown.reduction == "unknown"


def test_a_scaled_loss_is_seen_through():
    loss = F.mse_loss(logits(), TARGETS) / 4
    scaled = loss * 65536
    mark(scaled, "scaled")
    (term,) = terms_of(scaled, None)
    assert term.scale == pytest.approx(0.25)


def test_graph_statistics_count_what_a_graph_keeps():
    layer, norm = nn.Linear(5, 7), nn.BatchNorm1d(7)
    found = graph_stats(norm(layer(X)).square().sum(), may_read=True)
    kept = X.numel() + 2 * 6 * 7 + 2 * 7  # the input, what is normalized and what is squared; mean and deviation
    assert found.activation_bytes == 4 * (kept + 2 * 7)  # and the running statistics
    assert len(found.leaves) == 4 and len(found.batch_norms) == 1
    assert graph_stats(norm.eval()(layer(X)).sum(), may_read=True).batch_norms == []


def test_pairs_of_samples_are_told_from_layers_and_prototypes():
    a, b = nn.Linear(5, 3)(X), nn.Linear(5, 3)(X)
    prototypes = nn.Parameter(torch.randn(6, 3))
    assert graph_stats((a @ b.T).sum(), may_read=True).compared_rows == [6]
    assert graph_stats(torch.cdist(a, b).sum(), may_read=True).compared_rows == [6]
    assert graph_stats(torch.einsum("id,jd->ij", a, b).sum(), may_read=True).compared_rows == [6]
    assert 6 in graph_stats((a.T @ b).sum(), may_read=True).compared_rows  # summed over the rows
    assert graph_stats((a @ prototypes.T).sum(), may_read=True).compared_rows == []
    assert graph_stats(torch.cdist(a, prototypes).sum(), may_read=True).compared_rows == []
