"""Containers keep what they know: each is cut, moved and joined by its own means, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections import UserDict
from collections.abc import MutableMapping
from functools import cached_property
from typing import Any

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import gradfold
from gradfold.batch.cutting import cut_rows, join_rows, take_rows
from gradfold.batch.nesting import in_own_containers, map_tensors
from gradfold.batch.rows import count_rows, num_rows
from gradfold.batch.split import MicroBatch
from gradfold.engine.prefetch import prefetch
from gradfold.errors import BatchError

ROWS = 7
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class Sliceable:
    """A class of somebody's own, which knows its rows and its device."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y
        self.total = len(x)

    def __len__(self):
        return self.total

    def __getitem__(self, index):
        return Sliceable(self.x[index], self.y[index])

    def to(self, device):
        return Sliceable(self.x.to(device), self.y.to(device))


class Shaped(MutableMapping):
    """Stands in for a TensorDict: a mapping with a shape, which its constructor does not take from the values."""

    def __init__(self, values, rows=0, device=None):
        self._values, self.rows, self.device = dict(values), rows, device

    def __getitem__(self, key):
        if isinstance(key, str):
            return self._values[key]
        values = {name: value[key] for name, value in self._values.items()}
        return Shaped(values, len(next(iter(values.values()))), self.device)

    def __setitem__(self, key, value):
        self._values[key] = value

    def __delitem__(self, key):
        del self._values[key]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return self.rows

    def copy(self):
        return Shaped(self._values, self.rows, self.device)

    def to(self, device):
        return Shaped({key: value.to(device) for key, value in self._values.items()}, self.rows, torch.device(device))


class Graphs:
    """Stands in for a batch of graphs: nodes of all graphs in one tensor, and as a length the number of attributes."""

    def __init__(self, x, y, sizes):
        self.x, self.y, self.sizes = x, y, sizes

    @property
    def num_graphs(self):
        return len(self.sizes)

    def to_data_list(self):
        return list(zip(self.x.split(self.sizes), self.y.split(self.sizes), strict=True))

    @classmethod
    def from_data_list(cls, graphs):
        x, y = zip(*graphs, strict=True)
        return cls(torch.cat(x), torch.cat(y), list(map(len, x)))

    def to(self, device):  # in place, and returns nothing, as some do
        self.x, self.y = self.x.to(device), self.y.to(device)


@dataclasses.dataclass
class Own:
    """A dataclass that can be sliced, with a number beside its fields."""

    x: Tensor
    y: Tensor

    def __post_init__(self):
        self.total = len(self.x)

    def __len__(self):
        return self.total

    def __getitem__(self, index):
        return Own(self.x[index], self.y[index])

    def to(self, device):
        return Own(self.x.to(device), self.y.to(device))


@dataclasses.dataclass
class Lazy:
    """Its number of rows is computed when it is asked for, and kept."""

    x: Tensor
    y: Tensor

    @cached_property
    def total(self):
        return len(self.x)


def data():
    torch.manual_seed(0)
    return torch.randn(ROWS, 3, dtype=torch.float64), torch.randint(0, 2, (ROWS,))


def lengths():
    return [1, 4, 2, 3, 1, 5, 2]


def ragged():
    torch.manual_seed(1)
    return [torch.randn(length, 3, dtype=torch.float64) for length in lengths()]


def jagged():
    whole = torch.nested.nested_tensor(ragged(), layout=torch.jagged)
    other = torch.nested.nested_tensor_from_jagged(whole.values() ** 2, whole.offsets())
    return whole, other


def last(packed):
    return torch.stack([one.sum(0) for one in unpack_sequence(packed)])


def mean(logits, y):
    return F.cross_entropy(logits, y)


CASES: dict[str, tuple[Any, Any]] = {
    "an own class": (lambda x, y: Sliceable(x, y), lambda m, b: mean(m(b.x), b.y) * (b.total / len(b.x))),
    "a mapping with a shape": (
        lambda x, y: Shaped({"x": x, "y": y}, len(x)),
        lambda m, b: F.cross_entropy(m(b["x"]), b["y"], reduction="sum") / b.rows,
    ),
    "a shape inside": (
        lambda x, y: {"in": Shaped({"x": x}, len(x)), "y": y},
        lambda m, b: mean(m(b["in"]["x"]), b["y"]),
    ),
    "a sliceable dataclass": (lambda x, y: Own(x, y), lambda m, b: mean(m(b.x), b.y) * (b.total / len(b.x))),
    "a cached property": (
        lambda x, y: Lazy(x, y),
        lambda m, b: F.cross_entropy(m(b.x), b.y, reduction="sum") / b.total,
    ),
    "captions": (
        lambda x, y: {"x": x, "y": y, "captions": [f"a{'b' * row}" for row in range(len(x))]},
        lambda m, b: (
            F.cross_entropy(m(b["x"]), b["y"], reduction="none") * torch.tensor([*map(len, b["captions"])])
        ).mean(),
    ),
    "captions in a tuple": (
        lambda x, y: [x, tuple("ab"[label] for label in y.tolist())],
        lambda m, b: mean(m(b[0]), torch.tensor(["ab".index(one) for one in b[1]])),
    ),
    "objects": (
        lambda x, y: (x, [{"label": label, "boxes": x[: label + 1]} for label in y]),
        lambda m, b: (
            mean(m(b[0]), torch.stack([one["label"] for one in b[1]]))
            + torch.stack([m(one["boxes"]).sum() for one in b[1]]).mean()
        ),
    ),
    "ragged tensors in a list": (
        lambda x, y: {"x": ragged(), "y": y},
        lambda m, b: mean(m(torch.stack([one.sum(0) for one in b["x"]])), b["y"]),
    ),
    "packed sequences": (
        lambda x, y: (pack_sequence(ragged(), enforce_sorted=False), y),
        lambda m, b: mean(m(last(b[0])), b[1]),
    ),
    "sorted packed sequences": (
        lambda x, y: (pack_sequence(sorted(ragged(), key=len, reverse=True)), y),
        lambda m, b: mean(m(last(b[0])), b[1]) + 0 * len(b[0].data),
    ),
    "jagged tensors of the same lengths": (
        lambda x, y: (*jagged(), y),
        lambda m, b: mean(m(torch.stack([one.sum(0) for one in (b[0] * b[1]).unbind()])), b[2]),
    ),
    "nested tensors": (
        lambda x, y: {"x": torch.nested.nested_tensor(ragged(), layout=torch.strided), "y": y},
        lambda m, b: mean(m(torch.stack([one.sum(0) for one in b["x"].unbind()])), b["y"]),
    ),
}


@pytest.mark.parametrize("make, loss_fn", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_gradient_is_that_of_the_whole_batch(make, loss_fn, size):
    model = nn.Linear(3, 2).double()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, make(*data())))
    result = gradfold.Accumulator(model, loss_fn, micro_batch_size=size).backward(make(*data()))
    assert relative_error(gradients(model), expected) <= 1e-12
    assert result.num_micro_batches == -(-ROWS // size) and result.num_samples == ROWS


@pytest.mark.parametrize("make, loss_fn", CASES.values(), ids=CASES.keys())
def test_parts_joined_again_give_the_loss_of_the_whole(make, loss_fn):
    model = nn.Linear(3, 2).double()
    whole = loss_fn(model, make(*data()))
    try:
        joined = join_rows(cut_rows(make(*data()), [3, 2, 2]))
    except BatchError as error:
        assert "joined" in str(error)  # a class without torch.cat
        return
    assert torch.allclose(loss_fn(model, joined), whole, rtol=1e-12)


@pytest.mark.parametrize("make, loss_fn", CASES.values(), ids=CASES.keys())
def test_some_rows_are_those_of_the_whole(make, loss_fn):
    model = nn.Linear(3, 2).double()
    rows = [0, 2, 3]
    taken = take_rows(make(*data()), rows)
    one_by_one = [loss_fn(model, cut_rows(make(*data()), [row, 1, ROWS - row - 1])[1]) for row in rows]
    assert torch.allclose(loss_fn(model, taken), torch.stack(one_by_one).mean(), rtol=1e-12)


def test_graphs_are_cut_by_graph():
    x, y = torch.cat(ragged()), torch.arange(sum(lengths())) % 2

    def loss_fn(model, batch):
        return mean(model(batch.x), batch.y)

    model = nn.Linear(3, 2).double()
    batch = Graphs(x, y, lengths())
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=3, weight=lambda batch: len(batch.x))
    assert accumulator.backward(batch).num_micro_batches == 3
    assert relative_error(gradients(model), expected) <= 1e-12
    with pytest.raises(gradfold.NotDecomposableError, match="weight="):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=3).backward(batch)


def test_what_is_moved_uses_its_own_to_and_the_host_keeps_its_own():
    x, y = data()
    graphs, shaped, own = Graphs(x, y, [3, 4]), Shaped({"x": x}, ROWS, torch.device("cpu")), Sliceable(x, y)
    batch = {"graphs": graphs, "inner": [shaped, own], "names": ["a"] * ROWS}
    moved = prefetch([MicroBatch(batch, range(ROWS))], torch.device("meta"))(0)
    assert moved["graphs"].x.is_meta and not graphs.x.is_meta
    assert moved["inner"][0]["x"].is_meta and moved["inner"][0].device.type == "meta" and moved["inner"][0].rows == ROWS
    assert moved["inner"][1].x.is_meta and not own.x.is_meta and shaped.device.type == "cpu"


class InPlace(UserDict):
    """As a BatchEncoding does: `to` changes itself, and returns itself."""

    def to(self, device, *, non_blocking=False):
        self.data = {key: value.to(device, non_blocking=non_blocking) for key, value in self.data.items()}
        return self


def test_a_mapping_that_moves_itself_leaves_the_host_as_it_was():
    batch = InPlace(x=torch.zeros(3))
    moved = prefetch([MicroBatch(batch, range(3))], torch.device("meta"))(0)
    assert type(moved) is InPlace and moved["x"].is_meta and not batch["x"].is_meta


def test_other_values_and_own_containers_keep_the_shape():
    shaped = Shaped({"x": torch.ones(4)}, 4, "cpu")
    for other in (in_own_containers(shaped), map_tensors(torch.clone, shaped)):
        assert type(other) is Shaped and other.rows == 4 and other.device == "cpu" and other is not shaped
        other["x"] = torch.zeros(4)
    assert shaped["x"].sum() == 4


class Labeled(dict):
    """A dict with a number that its constructor does not take."""

    def __init__(self, values, split="train"):
        super().__init__(values)
        self.split = split


class Measured(MutableMapping):
    """Has no slices, and counts when it is made."""

    def __init__(self, values, step=0):
        self.values_, self.step = dict(values), step

    def __getitem__(self, key):
        return self.values_[key]

    def __setitem__(self, key, value):
        self.values_[key] = value

    def __delitem__(self, key):
        del self.values_[key]

    def __iter__(self):
        return iter(self.values_)

    def __len__(self):
        return len(self.values_)


def test_a_mapping_that_would_lose_what_it_knows_is_refused_by_name():
    assert cut_rows(Labeled({"x": torch.zeros(4)}, "test"), [2, 2])[1].split == "test"
    assert cut_rows(Measured({"x": torch.zeros(4)}), [2, 2])[1].step == 0
    with pytest.raises(BatchError, match=r"a Measured cannot be made again.*losing its step \(3\).*pass a dict"):
        cut_rows(Measured({"x": torch.zeros(4)}, step=3), [2, 2])


@dataclasses.dataclass
class Counted:
    x: Tensor
    n: int = 0


@pytest.mark.parametrize(
    "batch", [Counted(torch.zeros(5, 3).double(), 5), {"in": (Counted(torch.zeros(5, 3).double(), 5),)}]
)
def test_a_number_of_rows_that_was_counted_before_the_cut_is_refused(batch):
    def loss_fn(model, batch):
        inner = batch if isinstance(batch, Counted) else batch["in"][0]
        return model(inner.x).sum() / inner.n

    model = nn.Linear(3, 1).double()
    with pytest.raises(BatchError, match=r"\.n is 5, the number of rows.*property.*functools\.partial"):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(batch)
    assert gradfold.Accumulator(model, loss_fn).backward(batch).num_micro_batches == 1  # not cut


@pytest.mark.parametrize("sizes", [(5, 5), (5, 3)])
def test_a_number_of_rows_in_pieces_that_are_run_whole_is_no_reason_to_accuse_the_loss(sizes):
    def loss_fn(model, batch):
        return model(batch.x).sum() / batch.n

    model, x = nn.Linear(3, 1).double(), torch.randn(sum(sizes), 3).double()
    pieces = [Counted(part, len(part)) for part in x.split(list(sizes))]
    expected = full_batch_gradient(model, lambda model: loss_fn(model, Counted(x, len(x))))
    with pytest.warns(RuntimeWarning, match="the number of rows"):
        gradfold.Accumulator(model, loss_fn).backward(next(gradfold.windows(pieces, 2)))
    assert relative_error(gradients(model), expected) <= 1e-12


def test_another_number_is_the_same_for_all():
    assert [part.n for part in cut_rows(Counted(torch.zeros(5), 3), [3, 2])] == [3, 3]


def images(num, channels=3):
    torch.manual_seed(2)
    return [(torch.randn(channels, 4 + index % 3, 6).double(), index % 2) for index in range(num)]


def by_column(samples):
    return tuple(zip(*samples, strict=True))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, image):
        return self.linear(image.movedim(0, -1)).mean((0, 1))


def loss_of_images(model, batch):
    pictures, labels = batch
    return F.cross_entropy(torch.stack([model(one) for one in pictures]), torch.tensor(labels))


@pytest.mark.parametrize("num", [3, 4, 5, 7, 9])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_collate_says_what_a_row_is(num, size):
    """Three channels are not three rows, however many images there are."""
    model, samples = Net().double(), images(num)
    expected = full_batch_gradient(model, lambda model: loss_of_images(model, by_column(samples)))
    accumulator = gradfold.Accumulator(model, loss_of_images, micro_batch_size=size, collate=by_column)
    assert accumulator.backward(samples).weight == num
    assert relative_error(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize("num", [3, 5, 6])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("shape", [(3, 5, 6), (5, 3)])
def test_collate_may_hand_on_the_list(num, size, shape):
    torch.manual_seed(0)
    samples = [torch.randn(shape).double() for _ in range(num)]
    model = nn.Linear(shape[-1], 2).double()

    def loss_fn(model, batch):
        return torch.stack([model(one).square().sum() for one in batch]).mean()

    expected = full_batch_gradient(model, lambda model: loss_fn(model, samples))
    gradfold.Accumulator(model, loss_fn, micro_batch_size=size, collate=list).backward(samples)
    assert relative_error(gradients(model), expected) <= 1e-12


def test_the_self_check_does_not_cut_channels_where_random_numbers_are_drawn():
    """Parts that are cut, not collated, have the random numbers of the whole."""
    samples = [torch.randn(3, 5, 6).double() for _ in range(3)]
    model = nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5)).double()

    def loss_fn(model, batch):
        return torch.stack([model(one).square().sum() for one in batch]).mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random numbers of these rows cannot be handed to them
        gradfold.Accumulator(model, loss_fn, micro_batch_size=3, collate=list).backward([*samples, *samples])


def test_objects_in_a_list_that_agree_by_accident_are_samples():
    x, y = data()
    for one in (Sliceable(x, y), Shaped({"x": x}, ROWS)):
        with pytest.raises(BatchError, match="list of samples"):
            num_rows([one, one])


def test_windows_whose_pieces_are_run_whole_may_hold_anything():
    samples = images(7)
    pieces = [by_column(samples[:4]), by_column(samples[4:])]  # four and three images, of three channels each
    model = Net().double()
    expected = full_batch_gradient(model, lambda model: loss_of_images(model, by_column(samples)))
    accumulator = gradfold.Accumulator(model, loss_of_images, weight=lambda batch: len(batch[1]), self_check=False)
    for window in gradfold.windows(pieces, 2):
        assert accumulator.backward(window).weight == 7
    assert relative_error(gradients(model), expected) <= 1e-12
    with pytest.raises(BatchError, match="weight="):
        gradfold.Accumulator(model, loss_of_images).backward(next(gradfold.windows(pieces, 2)))


@pytest.mark.parametrize("adds_up", [False, True])
def test_a_piece_that_cannot_be_counted_weighs_what_its_weight_says(adds_up):
    class Opaque:
        def __init__(self, x):
            self.x = x

    x, _ = data()
    pieces = [Opaque(x[:5]), Opaque(x[5:])]

    def loss_fn(model, batch):
        total = model(batch.x).square().sum()
        return total if adds_up else total / len(batch.x)

    model = nn.Linear(3, 2).double()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, Opaque(x)))
    weight = "sum" if adds_up else (lambda batch: len(batch.x))
    accumulator = gradfold.Accumulator(model, loss_fn, weight=weight, self_check=False)
    accumulator.backward(next(gradfold.windows(pieces, 2)))
    assert relative_error(gradients(model), expected) <= 1e-12


def test_the_length_of_an_object_is_its_rows_where_it_is_not_cut():
    class Sized:
        def __init__(self, x):
            self.x = x

        def __len__(self):
            return len(self.x)

    x, _ = data()

    def loss_fn(model, batch):
        return model(batch.x).square().mean()

    model = nn.Linear(3, 2).double()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, Sized(x)))
    accumulator = gradfold.Accumulator(model, loss_fn, self_check=False)
    assert accumulator.backward(next(gradfold.windows([Sized(x[:5]), Sized(x[5:])], 2))).weight == ROWS
    assert relative_error(gradients(model), expected) <= 1e-12
    with pytest.raises(BatchError, match="Sized"):
        gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(Sized(x))


def test_what_does_not_fit_and_cannot_be_cut_says_so():
    class Opaque:
        def __init__(self, x):
            self.x = x

    def loss_fn(model, batch):
        raise torch.OutOfMemoryError("no memory")

    accumulator = gradfold.Accumulator(nn.Linear(3, 2), loss_fn, weight=lambda batch: 4, self_check=False)
    with pytest.raises(gradfold.DoesNotFitError, match="a batch whose rows cannot be counted does not fit"):
        accumulator.backward(Opaque(torch.zeros(4, 3)))


def test_windows_with_a_model_do_not_take_channels_for_rows():
    model, samples = Net().double(), images(14)
    pieces = [by_column(samples[start : start + 4]) for start in range(0, 14, 4)]
    with pytest.raises(gradfold.WeightError, match=r"weight=lambda batch: len\(batch\[0\]\)"):
        next(iter(gradfold.windows(pieces, 4, model=model)))
    expected = full_batch_gradient(model, lambda model: loss_of_images(model, by_column(samples)))
    for window in gradfold.windows(pieces, 4, model=model, weight=lambda batch: len(batch[0])):
        for batch in window:
            window.backward(loss_of_images(model, batch))
    assert relative_error(gradients(model), expected) <= 1e-12


def test_rows_counted_leniently_ignore_objects_and_nothing_else():
    x = torch.zeros(4, 2)
    assert count_rows({"x": x, "graph": object()}) == 4
    assert count_rows({"x": x[:0]}) == 0
    assert count_rows((x, x[:3])) is None and count_rows("text") is None
    with pytest.raises(BatchError, match=r"builtins\.object"):
        num_rows({"x": x, "graph": object()})


def test_a_batch_is_left_as_it_was():
    x, y = data()
    batch = {"x": x, "y": y, "names": list("abcdefg"), "own": Sliceable(x, y)}
    before = copy.copy(batch)
    cut_rows(batch, [4, 3])
    assert batch == before and len(batch["names"]) == ROWS and len(batch["own"]) == ROWS
