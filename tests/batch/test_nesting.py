"""A batch: what is cut by rows, what stays as it is, and what is refused by its path."""

from __future__ import annotations

import collections
import dataclasses
import enum
import types
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from gradfold.batch.cutting import cut_rows
from gradfold.batch.nesting import Marks, children_of, in_own_containers, map_tensors
from gradfold.batch.rows import num_rows
from gradfold.errors import BatchError


def take_rows(batch: Any, rows: range) -> Any:
    return cut_rows(batch, [rows.start, len(rows), num_rows(batch) - rows.stop])[1]


class Pair(NamedTuple):
    inputs: Any
    targets: Any


@dataclasses.dataclass
class Plain:
    inputs: Any
    scale: float = 2.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    inputs: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    inputs: Any


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlotted:
    inputs: Any


@dataclasses.dataclass
class RunsOnce:
    """Its __post_init__ would not take its own result."""

    inputs: Any

    def __post_init__(self):
        assert isinstance(self.inputs, tuple), "run a second time"
        self.inputs = self.inputs[0]


@dataclasses.dataclass
class Derived:
    inputs: Any
    mask: Any = dataclasses.field(init=False)

    def __post_init__(self):
        self.mask = self.inputs > 0


@dataclasses.dataclass
class Cached:
    """Not a field, but it stands in the object."""

    inputs: Any

    def __post_init__(self):
        self.mask = self.inputs > 0


class Wrapper(MutableMapping):
    """A mapping around a dict of its own, as many data libraries have one."""

    def __init__(self, data):
        self._data = data

    def __getitem__(self, key):
        return self._data[key]

    def __setitem__(self, key, value):
        self._data[key] = value

    def __delitem__(self, key):
        del self._data[key]

    def __iter__(self):
        return iter(self._data)

    def __len__(self):
        return len(self._data)


class AttributeDict(dict):
    """The well-known recipe for a dict whose keys are attributes."""

    def __init__(self, **values):
        super().__init__(**values)
        self.__dict__ = self


class ListOfOne(list):
    pass


def in_defaultdict(tensor):
    batch = collections.defaultdict(list)
    batch["inputs"] = tensor
    return batch


CONTAINERS = {
    "tensor": (lambda t: t, lambda b: b),
    "tuple": (lambda t: (t, t), lambda b: b[1]),
    "tuple of one": (lambda t: (t,), lambda b: b[0]),
    "list": (lambda t: [t, t], lambda b: b[0]),
    "a list's subclass": (lambda t: ListOfOne([t]), lambda b: b[0]),
    "dict": (lambda t: {"inputs": t}, lambda b: b["inputs"]),
    "named tuple": (lambda t: Pair(t, {"a": t}), lambda b: b.targets["a"]),
    "OrderedDict": (lambda t: collections.OrderedDict(z=t, a=t), lambda b: next(iter(b.values()))),
    "defaultdict": (in_defaultdict, lambda b: b["inputs"]),
    "UserDict": (lambda t: collections.UserDict({"inputs": t}), lambda b: b["inputs"]),
    "wrapping mapping": (lambda t: Wrapper({"inputs": t}), lambda b: b["inputs"]),
    "attribute dict": (lambda t: AttributeDict(inputs=t), lambda b: b.inputs),
    "dataclass": (Plain, lambda b: b.inputs),
    "frozen": (Frozen, lambda b: b.inputs),
    "slots": (Slotted, lambda b: b.inputs),
    "frozen slots": (FrozenSlotted, lambda b: b.inputs),
    "__post_init__": (lambda t: RunsOnce((t,)), lambda b: b.inputs),
    "nested": (lambda t: [{"a": (Frozen(Pair(t, None)), "words")}], lambda b: b[0]["a"][0].inputs.inputs),
}


@pytest.mark.parametrize("make, get", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_every_container_is_cut_by_rows_keeps_its_kind_and_leaves_the_batch_as_it_was(make, get):
    tensor = torch.arange(14.0).reshape(7, 2)
    batch = make(tensor)
    parts = cut_rows(batch, [3, 2, 2])
    assert [type(part) for part in parts] == [type(batch)] * 3
    assert torch.equal(torch.cat([get(part) for part in parts]), tensor)
    assert [len(get(part)) for part in parts] == [3, 2, 2]
    assert get(parts[1]).data_ptr() == tensor[3].data_ptr(), "a view, not a copy"
    assert get(batch).data_ptr() == tensor.data_ptr() and len(get(batch)) == 7


def containers_in(batch):
    """Those that something can be assigned to, by identity."""
    children = children_of(batch)
    inner = [found for _, part in children or [] for found in containers_in(part)]
    return inner if children is None or isinstance(batch, tuple) else [batch, *inner]


@pytest.mark.parametrize("make, get", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_own_containers_hold_the_same_tensors_and_are_new_all_the_way_down(make, get):
    """Inside of every other container, too."""
    tensor = torch.ones(3)
    for outer, _ in CONTAINERS.values():
        batch = outer(make(tensor)) if outer is not RunsOnce and outer is not Derived else make(tensor)
        own = in_own_containers(batch)
        assert type(own) is type(batch)
        before, now = containers_in(batch), containers_in(own)
        assert list(map(type, now)) == list(map(type, before))
        assert not {id(one) for one in before} & {id(one) for one in now}
    assert get(in_own_containers(make(tensor))) is tensor


class Sealed(collections.abc.Mapping):
    """A mapping that cannot be made again from its items."""

    def __init__(self, inputs, count):
        self.inputs = inputs
        assert count == 1

    def __getitem__(self, key):
        return {"inputs": self.inputs}[key]

    def __iter__(self):
        return iter(["inputs"])

    def __len__(self):
        return 1


class Picky(list):
    def __init__(self, only):
        super().__init__([only["inputs"]])


class WithSlots:
    __slots__ = ("inputs",)

    def __init__(self, inputs):
        self.inputs = inputs


def set_inputs(batch, value):
    batch.inputs = value


KEPT = {
    "a mapping without a constructor": (lambda t: Sealed(t, 1), set_inputs),
    "a list without a constructor": (lambda t: Picky({"inputs": t}), lambda b, value: b.__setitem__(0, value)),
    "an object": (lambda t: types.SimpleNamespace(inputs=t), set_inputs),
    "a dict in an object": (
        lambda t: types.SimpleNamespace(inner={"inputs": [t]}),
        lambda b, value: b.inner["inputs"].__setitem__(0, value),
    ),
    "slots of no dataclass": (WithSlots, set_inputs),
}


@pytest.mark.parametrize("make, put", KEPT.values(), ids=KEPT.keys())
def test_what_cannot_be_made_again_is_watched(make, put):
    tensor = torch.ones(3)
    batch = {"outer": [make(tensor)]}
    inner = batch["outer"][0]
    assert in_own_containers(batch)["outer"][0] is inner
    marks = Marks(batch)
    assert marks.changed() is None
    put(inner, torch.ones(3))
    assert marks.changed() is None  # the same values
    put(inner, tensor / 3)
    assert marks.changed().startswith("['outer'][0]")
    put(inner, tensor)
    assert marks.changed() is None
    tensor.mul_(2)
    assert marks.changed().startswith("['outer'][0]")


def test_an_attribute_that_is_filled_in_once_is_no_change():
    batch = types.SimpleNamespace(inputs=torch.ones(3), cached=None)
    marks = Marks(batch)
    batch.cached, batch.other = torch.ones(2), torch.ones(2)
    assert marks.changed() is None
    del batch.inputs
    assert marks.changed() == ".inputs"


@pytest.mark.parametrize("make, get", [case for name, case in CONTAINERS.items() if name != "nested"])
def test_every_container_has_the_rows_of_its_tensors(make, get):
    assert num_rows(make(torch.zeros(7, 2))) == 7


def test_fields_that_a_dataclass_makes_itself_are_cut_too():
    batch = Derived(torch.tensor([-1.0, 1, 2, -3]))
    part = take_rows(batch, range(1, 4))
    assert part.mask.tolist() == [True, True, False]
    assert batch.mask.tolist() == [False, True, True, False]


def test_a_tensor_beside_the_fields_of_a_dataclass_is_not_passed_on_whole_in_silence():
    batch = Cached(torch.tensor([-1.0, 1, 2, -3]))
    try:
        num_rows(batch)
    except BatchError:
        return
    assert take_rows(batch, range(1, 4)).mask.tolist() == [True, True, False]


def test_a_field_without_a_value_is_refused_by_its_path():
    @dataclasses.dataclass
    class Unset:
        inputs: Tensor
        mask: Tensor = dataclasses.field(init=False)

    with pytest.raises(BatchError, match="mask"):
        num_rows(Unset(torch.zeros(3)))


def test_a_defaultdict_keeps_its_factory_and_an_ordered_dict_its_order():
    assert take_rows(in_defaultdict(torch.zeros(3)), range(1))["new"] == []
    ordered = collections.OrderedDict(z=torch.zeros(3), a=torch.zeros(3))
    assert list(take_rows(ordered, range(1))) == ["z", "a"]


class Color(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    "constant",
    [None, True, 3, 2.5, 1j, "words", b"bytes", Color.RED, torch.float16, torch.device("cpu")],
    ids=repr,
)
def test_what_has_no_rows_is_the_same_for_every_micro_batch(constant):
    batch = {"inputs": torch.zeros(4, 2), "constant": constant}
    assert num_rows(batch) == 4
    assert take_rows(batch, range(1, 3))["constant"] is constant


@pytest.mark.parametrize("pack", [tuple, list])
def test_sequences_may_mix_rows_with_sparse_rows_and_0_d_tensors(pack):
    dense, same = torch.eye(5), torch.tensor(2.0)
    for batch in (pack([dense, dense.to_sparse()]), pack([dense, dense.to_sparse(), same]), pack([dense, dense, same])):
        assert num_rows(batch) == 5
        first, second = cut_rows(batch, [2, 3])
        assert type(first) is pack and len(first) == len(second) == len(batch)
        assert torch.equal(torch.cat([first[0], second[0]]), dense)
        assert torch.equal(torch.cat([first[1].to_dense(), second[1].to_dense()]), dense)
        if len(batch) == 3:
            assert first[2] == second[2] == same
            assert len({id(one) for one in (first[2], second[2], same)}) == 3, "a micro-batch may write to it"


def test_sparse_rows_keep_the_repeated_entries_that_were_not_merged_yet():
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2, 2]]), torch.ones(3), (4,), check_invariants=True)
    first, second = cut_rows((sparse, torch.zeros(4)), [2, 2])
    assert first[0].to_dense().tolist() == [1, 0] and second[0].to_dense().tolist() == [2, 0]


def test_a_dict_of_what_has_no_rows_is_the_same_for_every_micro_batch():
    batch = {"x": torch.zeros(4), "names": {"domain": "text", "epoch": 3}}
    assert num_rows(batch) == 4 and take_rows(batch, range(2))["names"] == batch["names"]


def test_a_mapping_that_cannot_be_written_to_becomes_a_dict():
    part = take_rows(types.MappingProxyType({"x": torch.arange(4.0)}), range(1, 3))
    assert part == {"x": part["x"]} and part["x"].tolist() == [1.0, 2.0]


def test_empty_containers_inside_of_a_batch_are_no_obstacle():
    batch = (torch.zeros(4), {}, [], ())
    assert num_rows(batch) == 4
    assert take_rows(batch, range(2))[1:] == ({}, [], ())


@pytest.mark.parametrize("dense_dims", [0, 1])
def test_sparse_coo_rows_are_those_of_the_dense_tensor(dense_dims):
    dense = torch.randn(6, 4, 2)
    dense[dense < 0.3] = 0
    sparse = dense.to_sparse(3 - dense_dims)
    assert num_rows({"x": sparse, "y": torch.zeros(6)}) == 6
    for rows in (range(0, 1), range(1, 4), range(4, 6)):
        assert torch.equal(take_rows(sparse, rows).to_dense(), dense[rows.start : rows.stop])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_csr_is_cut_or_refused_by_its_path():
    dense = torch.eye(4)
    batch = {"x": dense.to_sparse_csr(), "y": torch.zeros(4)}
    try:
        num_rows(batch)
    except BatchError as error:
        assert "['x']" in str(error)
        return
    assert torch.equal(take_rows(batch, range(1, 3))["x"].to_dense(), dense[1:3])


def tensors_in(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


def nestings(rows: int) -> st.SearchStrategy:
    leaves = st.integers(1, 3).map(lambda width: torch.randn(rows, width))
    constants = st.sampled_from([None, "text", 2.0, torch.tensor(1.0)])

    def extend(inner):
        part = inner | constants
        return (
            st.tuples(inner, part)
            | st.tuples(inner, part).map(lambda parts: Pair(*parts))
            | st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
            | leaves.map(lambda leaf: [leaf])
        )

    return st.recursive(leaves, extend, max_leaves=5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 9), st.integers(0, 9))
def test_cut_parts_put_together_again_are_the_batch(data, rows, at):
    batch = data.draw(nestings(rows))
    assert num_rows(batch) == rows
    at = min(at, rows)
    parts = [tensors_in(part) for part in cut_rows(batch, [at, rows - at])]
    for whole, first, second in zip(tensors_in(batch), *parts, strict=True):
        together = whole if whole.dim() == 0 else torch.cat([first, second])
        assert torch.equal(together, whole)


def test_parameters_are_tensors_too():
    part = take_rows({"x": nn.Parameter(torch.arange(4.0)), "y": torch.zeros(4)}, range(1, 3))
    assert part["x"].tolist() == [1.0, 2.0] and part["x"].requires_grad


def test_map_tensors_shares_what_is_no_tensor():
    words, thing = "words", object()
    batch = Pair((torch.zeros(2), words), {"thing": thing, "none": None})
    mapped = map_tensors(lambda tensor: tensor + 1, batch)
    assert mapped.inputs[0].tolist() == [1.0, 1.0] and mapped.inputs[1] is words
    assert mapped.targets["thing"] is thing and mapped.targets["none"] is None


def test_a_packed_sequence_keeps_its_batch_sizes_on_the_host():
    """Torch wants them there; the `.to` of a packed sequence knows that."""
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    moved = map_tensors(lambda tensor: tensor.to("meta"), packed)
    assert isinstance(moved, PackedSequence)
    assert moved.batch_sizes.device.type == "cpu"


X = torch.zeros(4, 2)
REFUSED = {
    "rows disagree": ({"x": X, "y": (X[:3], None)}, ["batch['x'] (4, 2)", "batch['y'][0] (3, 2)", "dim 0"]),
    "rows disagree in a tuple": ((X, X[:3]), ["batch[0] (4, 2)", "batch[1] (3, 2)", "collate="]),
    "rows disagree in a named tuple": (Pair(X, X[:1]), ["batch.inputs (4, 2)", "batch.targets (1, 2)"]),
    "rows disagree in a dataclass": (Plain({"a": X, "b": X[:2]}), ["batch.inputs['b'] (2, 2)"]),
    "no rows": ((X[:0], X[:0]), ["no rows", "batch[0] (0, 2)", "Skip empty batches"]),
    "nothing": ([], ["no tensor", "list of 0", "collate="]),
    "no tensor": ({"a": None, "b": "text"}, ["no tensor", "dict of 2"]),
    "only a 0-d tensor": (torch.tensor(3.0), ["no tensor with rows", "Tensor"]),
    "text": ("words", ["no tensor", "str"]),
    "numpy": ({"x": X, "y": np.zeros(4)}, ["batch['y']", "numpy.ndarray", "torch.as_tensor"]),
    "numpy number": ((X, np.float32(1)), ["batch[1]", "numpy.float32", "torch.as_tensor"]),
    "a packed sequence of other rows": ((pack_sequence([X, X[:1]]), X), ["disagree", "batch[1] (4, 2)"]),
    "object": ({"x": X, "graph": object()}, ["batch['graph']", "builtins.object", "collate="]),
    "a class": ({"x": X, "y": Plain}, ["batch['y']", "builtins.type"]),
    "set": ((X, {1, 2}), ["batch[1]", "set"]),
    "range": ((X, range(4)), ["batch[1]", "range"]),
    "list of strings": ({"x": X, "y": ["a", "b", "c"]}, ["batch['y']", "list of 3", "One value per row", "4 rows"]),
    "list of numbers": ((X, [1, 2, 3]), ["batch[1]", "list of 3", "make it a tensor"]),
    "list of objects": ((X, [object()] * 3), ["batch[1]", "list of 3", "4 rows"]),
    "list of dicts of numbers": ((X, [{"id": 1}] * 3), ["batch[1]", "list of 3", "4 rows"]),
    "list of other tensors": ((X, [X[:1], X[:3]]), ["disagree", "batch[1][0] (1, 2)", "a list of anything else"]),
    "as many as many": ((X[:2], [["a", "b"], ["c", "d"]]), ["batch[1]", "unclear", "in a dict"]),
    "numbers in a tuple": ((X, (224, 224)), ["batch[1]", "tuple of 2", "functools.partial"]),
    "a shape": ((X, X.shape), ["batch[1]", "Size of 2"]),
    "lists of strings": ((X, [["a", "b"], ["c"]]), ["batch[1][0]", "list of 2"]),
    "strings with a gap": ({"x": X, "y": ["a", None, "c"]}, ["batch['y']", "list of 3"]),
    "numbers with a gap": ({"x": X, "y": (1.0, None, 2.0)}, ["batch['y']", "tuple of 3"]),
}


@pytest.mark.parametrize("batch, words", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_cut_is_refused_with_its_path_and_what_to_write(batch, words):
    with pytest.raises(BatchError) as caught:
        num_rows(batch)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_whose_rows_have_holes_is_refused_alone_and_inside():
    starts, lengths = torch.tensor([0, 2, 5]), torch.tensor([1, 2])
    nested = torch.nested.nested_tensor_from_jagged(torch.ones(5, 3), starts, lengths)
    for batch, path in ((nested, "batch is"), ((X[:2], nested), "batch[1] is"), ({"x": [nested]}, "batch['x'][0] is")):
        with pytest.raises(BatchError, match=r"nested tensor.*collate=") as caught:
            num_rows(batch)
        assert path in str(caught.value)


def test_a_long_list_of_shapes_is_cut_short():
    with pytest.raises(BatchError, match=r"batch\[7\].*and 12 more") as caught:
        num_rows([torch.zeros(n) for n in range(1, 21)])
    assert "batch[8]" not in str(caught.value)
    with pytest.raises(BatchError, match=r"batch\[7\] \(8,\)\. Every"):
        num_rows([torch.zeros(n) for n in range(1, 9)])


def sample(label: int = 0) -> tuple[Tensor, Tensor]:
    return torch.zeros(5), torch.tensor([label] * 5)


IMAGE = torch.zeros(3, 8, 8)
SAMPLES = {
    "tuples": [sample() for _ in range(4)],
    "one tuple": [sample()],
    "tuples of a tensor and a number": [(torch.zeros(5), 3), (torch.zeros(5), 4)],
    "named tuples": [Pair(*sample()), Pair(*sample())],
    "dicts": [{"x": torch.zeros(5), "y": torch.zeros(5)} for _ in range(3)],
    "dataclasses": [Frozen(torch.zeros(5)) for _ in range(3)],
    "images": [IMAGE] * 4,
    "images in a tuple": (IMAGE,) * 8,
    "images with transparency": [torch.zeros(4, 8, 8)] * 5,
    "images inside of a dict": {"images": [IMAGE] * 5},
    "images beside targets": ([IMAGE] * 5, [{"boxes": torch.zeros(3, 4)}] * 5),
    "as many square images as channels": (IMAGE,) * 3,
    "two images of other sizes": (torch.zeros(3, 8, 6), torch.zeros(3, 7, 5)),
    "three images beside labels": (tuple(torch.zeros(3, h, 8) for h in (6, 7, 9)), (1, 2, 3)),
    "three images beside targets": ([torch.zeros(3, 9, 8)] * 3, [{"label": torch.tensor(1)}] * 3),
}


@pytest.mark.parametrize("batch", SAMPLES.values(), ids=SAMPLES.keys())
def test_a_list_of_samples_that_agree_by_accident_is_refused(batch):
    with pytest.raises(BatchError, match=r"looks like a list of samples.*by\s+accident.*collate=.*default_collate"):
        num_rows(batch)


NO_SAMPLES = {
    "source and target": ([torch.zeros(6, 9), torch.zeros(6, 7)], 6),
    "columns": ([torch.zeros(6), torch.zeros(6, 1), torch.zeros(6, 2)], 6),
    "two views of images": ([torch.zeros(6, 3, 8, 8), torch.zeros(6, 3, 8, 8)], 6),
    "many views of images": ([torch.zeros(6, 3, 8, 8)] * 7, 6),
    "sequences": ((torch.zeros(6, 9, 4), torch.zeros(6, 7, 4), torch.zeros(6, 7, 4)), 6),
    "two rows of three sequences": ((torch.zeros(2, 9, 4), torch.zeros(2, 7, 4), torch.zeros(2, 7, 4)), 2),
    "the last row of two sequences": ((torch.zeros(1, 9, 4), torch.zeros(1, 7, 4)), 1),
    "the last row of two sequences inside": ({"x": [torch.zeros(1, 9, 4), torch.zeros(1, 7, 4)]}, 1),
    "the last three rows of two sequences": ((torch.zeros(3, 9, 4), torch.zeros(3, 7, 4)), 3),
    "the last three rows of three sequences": ((torch.zeros(3, 9, 4),) * 3, 3),
    "inputs in a list, as torch collates tuples": ([[torch.zeros(6, 2), torch.zeros(6, 3)], torch.zeros(6)], 6),
    "two lists": ([[torch.zeros(6), torch.zeros(6)], [torch.zeros(6), torch.zeros(6)]], 6),
    "a tuple of dicts": (({"x": torch.zeros(6)}, {"y": torch.zeros(6)}), 6),
    "a tuple of tuples": (((torch.zeros(6), torch.zeros(6)), (torch.zeros(6),)), 6),
    "one image": ((torch.zeros(1, 3, 8, 8), torch.zeros(1)), 1),
}


@pytest.mark.parametrize("batch, rows", NO_SAMPLES.values(), ids=NO_SAMPLES.keys())
def test_a_batch_of_columns_is_not_taken_for_samples(batch, rows):
    assert num_rows(batch) == rows


def test_a_list_of_dicts_with_keys_of_their_own_is_not_taken_for_samples():
    """What torch's default_collate makes of a dataset that returns (inputs, targets) as two dicts."""
    samples = [({"x": torch.zeros(2), "m": torch.zeros(2)}, {"y": torch.zeros(1)}) for _ in range(6)]
    batch = torch.utils.data.default_collate(samples)
    assert isinstance(batch, list)
    assert num_rows(batch) == 6


def test_a_last_batch_of_one_row_is_not_taken_for_samples():
    """One row is never cut, so nothing can go wrong, and an epoch must not end in an error."""
    assert num_rows((torch.zeros(1, 9, 4), torch.zeros(1, 7, 4), torch.zeros(1, 7, 1))) == 1
