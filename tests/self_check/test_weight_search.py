"""The search for weights: what it prints is Python, and the weight that it prints makes the window exact."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gradfold
from gradfold.self_check.diagnosis import find_weight

LENGTHS = torch.tensor([2, 2, 2, 7, 8, 6, 7, 8, 2, 3, 2, 2, 2, 3, 2, 2])


def labels(ignored=-100):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        outside = torch.arange(8) >= LENGTHS[:, None]
        return torch.randint(1, 5, (16, 8)).masked_fill(outside, ignored)


def inputs():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return torch.randn(16, 8, 4)


class Pair(NamedTuple):
    x: torch.Tensor
    labels: torch.Tensor


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    labels: torch.Tensor


def tuple_of(x, y):
    return (x, y)


def keyed(key):
    return lambda x, y: {"x": x, key: y}


BATCHES = {
    "a tuple": (tuple_of, lambda batch: batch[1]),
    "a list": (lambda x, y: [x, y], lambda batch: batch[1]),
    "a dict": (keyed("labels"), lambda batch: batch["labels"]),
    "a key with a quote": (keyed("it's"), lambda batch: batch["it's"]),
    "a key with a double quote": (keyed('a"b'), lambda batch: batch['a"b']),
    "a key with a dot": (keyed("a.b"), lambda batch: batch["a.b"]),
    "a key with a bracket": (keyed("a[0]"), lambda batch: batch["a[0]"]),
    "a key with a backslash": (keyed("a\\b\n"), lambda batch: batch["a\\b\n"]),
    "a number as a key": (keyed(3), lambda batch: batch[3]),
    "a tuple as a key": (keyed((1, "a")), lambda batch: batch[1, "a"]),
    "a named tuple": (Pair, lambda batch: batch.labels),
    "a dataclass": (Record, lambda batch: batch.labels),
    "a nesting": (lambda x, y: {"in": [x], "out": (None, {"y": y})}, lambda batch: batch["out"][1]["y"]),
    "a dataclass in a dict": (lambda x, y: {"one": Record(x, y)}, lambda batch: batch["one"].labels),
}


def first_inputs(batch):
    """The only floating point leaf."""
    found = []
    gradfold.batch.nesting.map_tensors(lambda leaf: found.append(leaf) if leaf.is_floating_point() else None, batch)
    return found[0]


def model():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Linear(4, 6)


def refusal(loss_fn, batch, **options):
    with pytest.raises(gradfold.NotDecomposableError) as caught:
        gradfold.Accumulator(model(), loss_fn, micro_batch_size=8, **options).backward(batch)
    return caught.value


def assert_it_works(text, loss_fn, batch):
    """The text is Python for a weight; under it the self-check is silent, and the gradient that of the batch."""
    weight = eval(text, {"gradfold": gradfold, "torch": torch})
    whole, parts = model(), model()
    loss_fn(whole, batch).backward()
    gradfold.Accumulator(parts, loss_fn, micro_batch_size=8, weight=weight).backward(batch)
    torch.testing.assert_close(parts.weight.grad, whole.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BATCHES)
def test_labels_are_found_in(name):
    make, of = BATCHES[name]
    batch = make(inputs(), labels())

    def loss_fn(model, batch):
        return F.cross_entropy(model(first_inputs(batch)).flatten(0, 1), of(batch).flatten())

    error = refusal(loss_fn, batch)
    assert error.cause == "weights"
    assert "token_count" in error.weight
    assert f"Write weight={error.weight}." in str(error)
    assert_it_works(error.weight, loss_fn, batch)


@pytest.mark.parametrize("ignored", [-100, -1, 0, 255])
@pytest.mark.parametrize("shift", [False, True])
def test_labels_ignored_under_any_usual_number_and_shifted_ones(ignored, shift):
    def loss_fn(model, batch):
        logits, y = model(batch["x"]), batch["y"]
        logits, y = (logits[:, :-1], y[:, 1:]) if shift else (logits, y)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=ignored)

    batch = {"x": inputs(), "y": labels(ignored)}
    error = refusal(loss_fn, batch)
    assert ("shift=True" in error.weight) is shift
    assert (f"ignore_index={ignored}" in error.weight) is (ignored != -100)
    assert_it_works(error.weight, loss_fn, batch)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64])
def test_masks_of_any_type(dtype):
    def loss_fn(model, batch):
        mask = batch["mask"].float()
        return (model(batch["x"]).square().mean(2) * mask).sum() / mask.sum()

    batch = {"x": inputs(), "mask": (labels() > 0).to(dtype)}
    error = refusal(loss_fn, batch)
    assert "mask" in error.weight
    assert_it_works(error.weight, loss_fn, batch)


def test_numbers_per_row():
    def loss_fn(model, batch):
        return (model(batch[0]).square().mean((1, 2)) * batch[1]).sum() / batch[1].sum()

    batch = (inputs(), torch.linspace(0.1, 2, 16).square())
    error = refusal(loss_fn, batch)
    assert error.weight == "lambda batch: batch[1].sum()"
    assert_it_works(error.weight, loss_fn, batch)


def test_a_batch_that_is_one_tensor():
    def loss_fn(model, batch):
        kept = batch[..., :1] > 0
        return (model(batch).square() * kept).sum() / kept.sum()

    batch = inputs() * (torch.rand(16, 8, 1) < torch.linspace(0.1, 1, 16)[:, None, None])
    batch[:, 0] = 1
    weight = "lambda batch: (batch[..., :1] > 0).sum()"
    assert_it_works(weight, loss_fn, batch)
    assert refusal(loss_fn, batch).cause == "weights"
    first, second = torch.tensor([1, 0, 0, 2]), torch.tensor([3, 1, 1, 0])
    assert find_weight(first, second, (4, 4), 2 / 5) == "gradfold.token_count(lambda batch: batch, ignore_index=0)"


def test_samples_come_first():
    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]).mean(1), batch[1])

    error = refusal(loss_fn, (inputs(), torch.arange(16) % 6), weight=lambda batch: batch[1].sum())
    assert error.weight == '"samples"'


def test_nothing_is_named_where_nothing_fits():
    def loss_fn(model, batch):
        factor = torch.tensor([0.3, 7.0, 1.1, 0.2, 0.9, 2.0])
        return F.cross_entropy(model(batch[0]).mean(1), batch[1], weight=factor)

    error = refusal(loss_fn, (inputs(), torch.tensor([0, 2, 1, 1, 5, 1, 3, 4] * 2)))
    assert error.weight is None
    assert "class_weights" in str(error)


def test_of_several_terms_the_text_names_the_wrong_one():
    def loss_fn(model, batch):
        each = model(batch["x"]).flatten(0, 1)
        return {"size": each.square().mean(), "tokens": F.cross_entropy(each, batch["y"].flatten())}

    batch = {"x": inputs(), "y": labels()}
    error = refusal(loss_fn, batch, weight={"size": "samples", "tokens": "samples"})
    assert error.term == "tokens"
    assert error.weight == 'gradfold.token_count("y")'
    assert "weight={..., 'tokens': gradfold.token_count(\"y\")}" in str(error)


def test_parts_of_other_contents_name_nothing():
    assert find_weight({"y": torch.ones(2)}, {"z": torch.ones(6)}, (2, 6), 0.5) is None


@pytest.mark.parametrize("leaf", [["a", "b"], nn.utils.rnn.pack_sequence([torch.ones(2)]), object(), [1, 2]])
def test_what_cannot_be_cut_by_rows_does_not_hide_the_labels_beside_it(leaf):
    first, second = ({"other": leaf, "y": y} for y in (labels()[:2], labels()[2:8]))
    share = float((labels()[:2] > 0).sum() / (labels()[:8] > 0).sum())
    assert find_weight(first, second, (2, 6), share) == 'gradfold.token_count("y")'


def test_rows_of_nearly_one_length_are_not_taken_for_samples():
    """The default weight was refused, and advised."""
    torch.manual_seed(0)
    x, y = torch.randn(9, 203, 4).double(), torch.randint(0, 3, (9, 203))
    for row, length in enumerate([199, 201, 200, 203, 200, 200, 198, 201, 200]):
        y[row, length:] = -100
    model = nn.Linear(4, 3).double()

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())

    with pytest.raises(gradfold.NotDecomposableError, match=r'weight=gradfold.token_count\("y"\)'):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=3).backward({"x": x, "y": y})
