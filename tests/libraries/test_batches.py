"""Batches of tensordict, torch_geometric and transformers: cut by their own means, and the gradient of the whole."""

from __future__ import annotations

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch import nn
from torch.nn import functional as F

import gradfold
from gradfold.batch.split import MicroBatch
from gradfold.engine.prefetch import prefetch

ROWS = 13


def check(model, loss_fn, batch, sizes=(1, 4, 5), **options):
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    for size in sizes:
        model.zero_grad()
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, **options)
        assert accumulator.backward(batch).num_micro_batches == -(-ROWS // size)
        assert relative_error(gradients(model), expected) <= 1e-12


def per_row(model, batch):
    """A mean, by the shape that the batch knows."""
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum") / batch.batch_size[0]


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {"x": torch.randn(ROWS, 5).double(), "y": torch.randint(0, 3, (ROWS,))}


@pytest.mark.parametrize("kind", ["plain", "lazy", "inside"])
def test_a_tensor_dict_keeps_its_shape(kind, tensors):
    tensordict = pytest.importorskip("tensordict")
    batch = tensordict.TensorDict(tensors, batch_size=[ROWS], names=["rows"])
    model = nn.Linear(5, 3).double()
    if kind == "lazy":
        batch = tensordict.lazy_stack(list(batch.unbind(0)))
    if kind == "inside":
        check(model, lambda model, batch: per_row(model, batch["in"][0]), {"in": (batch,), "names": ["a"] * ROWS})
        return
    check(model, per_row, batch)
    check(model, per_row, batch, weight=len)
    moved = prefetch([MicroBatch(batch, range(ROWS))], torch.device("meta"))(0)
    assert moved.batch_size == batch.batch_size and moved["x"].is_meta and not batch["x"].is_meta


def test_a_tensor_class_keeps_its_shape(tensors):
    tensordict = pytest.importorskip("tensordict")

    class Rows:
        x: torch.Tensor
        y: torch.Tensor
        origin: str

    Rows.__annotations__ = {"x": torch.Tensor, "y": torch.Tensor, "origin": str}
    kind = tensordict.tensorclass(Rows)
    batch = kind(**tensors, origin="train", batch_size=[ROWS])

    def loss_fn(model, batch):
        assert batch.origin == "train"
        return F.cross_entropy(model(batch.x), batch.y, reduction="sum") / batch.batch_size[0]

    check(nn.Linear(5, 3).double(), loss_fn, batch)


def test_a_tensor_dict_without_a_shape_is_a_dict(tensors):
    tensordict = pytest.importorskip("tensordict")
    batch = tensordict.TensorDict(tensors, batch_size=[])
    check(nn.Linear(5, 3).double(), lambda model, batch: F.cross_entropy(model(batch["x"]), batch["y"]), batch)


def graphs():
    geometric = pytest.importorskip("torch_geometric.data")
    torch.manual_seed(0)
    sizes = torch.randint(3, 9, (ROWS,)).tolist()
    return geometric.Batch, [
        geometric.Data(
            x=torch.randn(size, 4).double(),
            edge_index=torch.randint(0, size, (2, 2 * size)),
            y=torch.randint(0, 3, (size,)),
        )
        for size in sizes
    ]


def of_nodes(model, batch):
    source, target = batch.edge_index
    return F.cross_entropy(model(batch.x.index_add(0, target, batch.x[source])), batch.y)


def test_graphs_are_cut_by_graph_or_collated_or_run_whole():
    kind, data = graphs()
    batch, model = kind.from_data_list(data), nn.Linear(4, 3).double()
    check(model, of_nodes, batch, weight=lambda batch: batch.num_nodes)
    expected = full_batch_gradient(model, lambda model: of_nodes(model, batch))
    model.zero_grad()
    options = {"collate": kind.from_data_list, "weight": lambda batch: batch.num_nodes, "micro_batch_size": 4}
    gradfold.Accumulator(model, of_nodes, **options).backward(data)
    assert relative_error(gradients(model), expected) <= 1e-12
    model.zero_grad()
    pieces = [kind.from_data_list(data[:6]), kind.from_data_list(data[6:])]
    for window in gradfold.windows(pieces, 2):
        gradfold.Accumulator(model, of_nodes, weight=lambda batch: batch.num_nodes).backward(window)
    assert relative_error(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize("collated", [False, True])
def test_a_mean_over_nodes_is_not_one_over_graphs(collated):
    kind, data = graphs()
    model = nn.Linear(4, 3).double()
    options = {"collate": kind.from_data_list} if collated else {}
    with pytest.raises(gradfold.NotDecomposableError):
        accumulator = gradfold.Accumulator(model, of_nodes, micro_batch_size=4, **options)
        accumulator.backward(data if collated else kind.from_data_list(data))


def test_graphs_on_a_device_leave_the_host_as_it_was():
    kind, data = graphs()
    batch = kind.from_data_list(data)
    moved = prefetch([MicroBatch(batch, range(ROWS))], torch.device("meta"))(0)
    assert moved.x.is_meta and not batch.x.is_meta and moved.num_graphs == ROWS


def test_what_transformers_makes_keeps_its_kind(tensors):
    transformers = pytest.importorskip("transformers")
    outputs = pytest.importorskip("transformers.modeling_outputs")
    encoding = transformers.BatchEncoding(tensors)
    output = outputs.BaseModelOutput(last_hidden_state=tensors["x"])

    def loss_fn(model, batch):
        assert type(batch["encoding"]) is transformers.BatchEncoding
        assert type(batch["output"]) is outputs.BaseModelOutput
        return F.cross_entropy(model(batch["output"].last_hidden_state + batch["encoding"].x), batch["encoding"].y)

    batch = {"encoding": encoding, "output": output}
    check(nn.Linear(5, 3).double(), loss_fn, batch)
    moved = prefetch([MicroBatch(batch, range(ROWS))], torch.device("meta"))(0)
    assert moved["encoding"]["x"].is_meta and not encoding["x"].is_meta
    assert type(moved["output"]) is outputs.BaseModelOutput and moved["output"].last_hidden_state.is_meta
