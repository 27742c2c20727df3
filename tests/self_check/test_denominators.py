"""A sum of means with denominators of their own: recognized in the graph, and proved by an experiment."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.engine.loss_graph import denominators_of
from gradfold.errors import NotDecomposableError

TOKENS = gradfold.token_count("labels", shift=True)


def heads(num_heads=2, dropout=0.0):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Embedding(9, 6), nn.Dropout(dropout))
    return nn.ModuleList([body, *(nn.Linear(6, 9) for _ in range(num_heads))]).double()


def sequences(num_rows=16, length=10):
    torch.manual_seed(1)
    ids = torch.randint(0, 9, (num_rows, length))
    labels = ids.clone()
    for row, end in enumerate(torch.randint(3, length + 1, (num_rows,)).tolist()):
        labels[row, end:] = -100
    return {"ids": ids, "labels": labels}


def terms(model, batch):
    """Head k predicts the label k + 1 further on."""
    hidden = model[0](batch["ids"]).tanh()
    return {
        f"head {k}": F.cross_entropy(head(hidden)[:, : -k - 1].transpose(1, 2), batch["labels"][:, k + 1 :])
        for k, head in enumerate(list(model)[1:])
    }


def weights(num_heads=2):
    return {f"head {k}": (lambda batch, k=k: (batch["labels"][:, k + 1 :] != -100).sum()) for k in range(num_heads)}


def summed(model, batch):
    return sum(terms(model, batch).values())


def scaled(model, batch):
    first, second = terms(model, batch).values()
    return (first + 0.3 * second) / 2 - 0.1 * second


def by_hand(model, batch):
    """The means over masks, as TRL and others write them."""
    hidden = model[0](batch["ids"]).tanh()
    found = []
    for k, head in enumerate(list(model)[1:]):
        labels = batch["labels"][:, k + 1 :]
        losses = F.cross_entropy(head(hidden)[:, : -k - 1].transpose(1, 2), labels, reduction="none")
        found.append((losses * (labels != -100)).sum() / (labels != -100).sum())
    return sum(found)


def refusal(loss_fn, model=None, **options):
    accumulator = gradfold.Accumulator(model or heads(), loss_fn, micro_batch_size=4, **{"weight": TOKENS} | options)
    with pytest.raises(NotDecomposableError) as caught:
        accumulator.backward(sequences())
    return caught.value


@pytest.mark.parametrize("loss_fn", [summed, scaled, by_hand])
@pytest.mark.parametrize("weight", [TOKENS, "samples", "sum"])
def test_a_sum_of_two_means_is_told_to_be_a_dict(loss_fn, weight):
    error = refusal(loss_fn, weight=weight)
    assert error.cause == "weights" and "a sum of 2 means, each with a denominator of its own (" in str(error)
    assert "Return a dict of terms" in str(error) and "TwoPhaseLoss" not in str(error)


def test_three_means_and_dropout():
    assert "a sum of 3 means" in str(refusal(summed, heads(3, dropout=0.3)))


def test_as_a_term_of_a_dict():
    def loss_fn(model, batch):
        return {"both": summed(model, batch), "rows": model[1].weight.square().sum()}

    error = refusal(loss_fn, weight={"both": TOKENS, "rows": "samples"})
    assert error.term == "both" and "the loss term 'both' is a sum of 2 means" in str(error)


def test_the_remedy_is_exact():
    model, batch = heads(), sequences()
    gradfold.Accumulator(model, terms, micro_batch_size=4, weight=weights()).backward(batch)
    assert relative_error(gradients(model), full_batch_gradient(heads(), lambda model: summed(model, batch))) <= 1e-12


def test_verify_says_the_same():
    verdict = gradfold.verify(gradfold.Accumulator(heads(), summed, micro_batch_size=4, weight=TOKENS), sequences())
    assert [cause.name for cause in verdict.causes] == ["weights"] and "a sum of 2 means" in verdict.causes[0].text


class TestOtherReasons:
    """Means in the graph that are not what is wrong."""

    def test_means_of_one_denominator(self):
        def loss_fn(model, batch):
            hidden = model[0](batch["ids"]).tanh()
            odd = batch["labels"] % 3 == 1  # which no candidate counts
            return sum((head(hidden).square().mean(-1) * odd).sum() / odd.sum() for head in list(model)[1:])

        error = refusal(loss_fn)
        assert error.cause == "weights" and "Return a dict of terms" not in str(error)

    def test_rows_that_depend_on_each_other(self):
        def loss_fn(model, batch):
            pooled = model[1](model[0](batch["ids"]).mean(1))
            first, second = terms(model, batch).values()
            return first + second + F.cross_entropy(pooled @ pooled.T, torch.arange(len(pooled)))

        error = refusal(loss_fn)
        assert error.cause == "coupled" and "TwoPhaseLoss" in str(error)

    def test_one_mean(self):
        error = refusal(lambda model, batch: terms(model, batch)["head 1"], weight="samples")
        assert "Return a dict of terms" not in str(error)


class TestGraph:
    def test_each_mean_with_what_it_divides_by(self):
        values = torch.ones(6, requires_grad=True)
        mask = torch.tensor([1.0, 1, 0, 1, 0, 0])
        loss = (values * 2).mean() - 3 * ((values * mask).sum() / mask.sum()) / 5
        assert sorted(denominators_of(loss).values()) == [3.0, 6.0]

    @pytest.mark.parametrize("last", [lambda values: values.sum(), lambda values: values.max(), torch.logsumexp])
    def test_nothing_where_one_term_is_none(self, last):
        values = torch.ones(6, requires_grad=True)
        other = last(values, 0) if last is torch.logsumexp else last(values)
        assert denominators_of(values.mean() + other) == {}
