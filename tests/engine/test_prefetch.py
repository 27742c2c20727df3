"""A feed: micro-batches reach the device one ahead, and the host keeps its own. The meta device stands in for one."""

from __future__ import annotations

import contextlib
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from gradfold.batch.split import MicroBatch, split_rows
from gradfold.engine.prefetch import prefetch

DEVICE = torch.device("meta")


class Moves(TorchDispatchMode):
    """Writes down the rows of each tensor that goes to another device."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.rows.append(len(args[0]))
        return result


def parts(*sizes: int) -> list[MicroBatch]:
    return [MicroBatch({"x": torch.zeros(size), "n": size}, range(size)) for size in sizes]


def test_on_the_cpu_a_micro_batch_is_handed_on_itself():
    micro_batches = parts(3, 2)
    take = prefetch(micro_batches, torch.device("cpu"))
    assert take(0) is micro_batches[0].data and take(1) is micro_batches[1].data and take(0) is micro_batches[0].data


def test_the_next_micro_batch_moves_when_one_is_asked_for():
    with Moves() as moves:
        take = prefetch(parts(5, 4, 3), DEVICE)
        assert moves.rows == []
        seen = []
        for index in range(3):
            batch = take(index)
            assert batch["x"].device.type == "meta" and len(batch["x"]) == batch["n"] == 5 - index
            seen.append(list(moves.rows))
    assert seen == [[5, 4], [5, 4, 3], [5, 4, 3]]  # each moves once


def test_any_micro_batch_can_be_asked_for_again():
    take = prefetch(parts(5, 4, 3), DEVICE)
    assert [len(take(index)["x"]) for index in (0, 0, 2, 1, 1, 2, 0)] == [5, 5, 3, 4, 4, 3, 5]


def test_the_host_keeps_its_own():
    micro_batches = parts(3, 2)
    kept = [part.data["x"] for part in micro_batches]
    take = prefetch(micro_batches, DEVICE)
    take(0), take(1)
    assert all(part.data["x"] is tensor and tensor.is_cpu for part, tensor in zip(micro_batches, kept, strict=True))


def test_two_micro_batches_at_most_are_held_on_the_device():
    take = prefetch(parts(*range(1, 9)), DEVICE)
    alive: list[weakref.ref] = []
    for index in range(8):
        batch = take(index)
        alive.append(weakref.ref(batch["x"]))
        del batch
        assert sum(reference() is not None for reference in alive) == 0, "the feed keeps none that was handed out"


def test_nestings_are_moved_as_they_are_and_constants_shared():
    words = ["a", "b"]
    batch = ({"x": [torch.zeros(2)]}, words, None, torch.tensor(1.0))
    moved = prefetch([MicroBatch(batch, range(2))], DEVICE)(0)
    assert moved[0]["x"][0].device.type == "meta" and moved[3].device.type == "meta"
    assert moved[1] == words and moved[2] is None
    assert batch[0]["x"][0].is_cpu


def test_what_is_on_the_device_already_is_not_moved():
    tensor = torch.zeros(4, device=DEVICE)
    with Moves() as moves:
        assert prefetch([MicroBatch(tensor, range(4))], DEVICE)(0) is tensor
    assert moves.rows == []


def test_a_split_batch_arrives_in_pieces():
    take = prefetch(split_rows((torch.zeros(7, 2), torch.zeros(7)), 3), DEVICE)
    assert [tuple(tensor.shape for tensor in take(index)) for index in range(3)] == [
        ((3, 2), (3,)),
        ((3, 2), (3,)),
        ((1, 2), (1,)),
    ]


def test_a_packed_sequence_arrives_as_its_own_to_would_move_it():
    packed = pack_sequence([torch.ones(3, 1), torch.ones(2, 1)])
    moved = prefetch([MicroBatch((packed, torch.zeros(2)), range(2))], DEVICE)(0)[0]
    assert moved.data.device.type == "meta" and moved.batch_sizes.device.type == "cpu"


def test_a_collated_object_with_a_to_of_its_own_arrives_on_the_device():
    """Graph batches and the like: collate makes them, and they know how to move themselves."""

    class Graph:
        def __init__(self, nodes):
            self.nodes = nodes

        def to(self, device, **_):
            return Graph(self.nodes.to(device))

    graph = Graph(torch.zeros(5))
    moved = prefetch([MicroBatch(graph, range(2))], DEVICE)(0)
    assert moved.nodes.device.type == "meta" and graph.nodes.is_cpu


class Streams:
    """Stands in for CUDA and writes down what happens on which stream."""

    def __init__(self):
        self.events: list[str] = []
        self.current = "main"

    def wait_stream(self, stream):
        self.events.append(f"main waits for {stream}")

    @contextlib.contextmanager
    def use(self, stream):
        self.current = stream
        yield
        self.current = "main"


class OnCuda(torch.Tensor):
    """A tensor that says of itself where it is."""

    streams: Streams
    place = "cpu"

    @property
    def device(self):
        return torch.device(self.place)

    @property
    def is_cpu(self):
        return self.place == "cpu"

    @property
    def is_cuda(self):
        return self.place != "cpu"

    def to(self, device, non_blocking):
        assert non_blocking
        moved = torch.zeros(len(self)).as_subclass(OnCuda)
        moved.place, moved.streams = str(device), self.streams
        self.streams.events.append(f"{len(self)} copied on {self.streams.current}")
        return moved

    def record_stream(self, stream):
        assert stream is self.streams
        self.streams.events.append(f"{len(self)} used on main")


@pytest.fixture
def streams(monkeypatch):
    streams = Streams()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", streams.use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams)
    return streams


def on(place, size, streams):
    tensor = torch.zeros(size).as_subclass(OnCuda)
    tensor.place, tensor.streams = place, streams
    return tensor


def test_on_cuda_copies_run_beside_the_computation_and_are_waited_for(streams):
    take = prefetch([MicroBatch([on("cpu", size, streams)], range(size)) for size in (3, 2, 1)], torch.device("cuda:0"))
    assert take(0)[0].place == "cuda:0"
    take(1), take(2)
    assert streams.events == [
        "3 copied on side",
        "main waits for side",
        "3 used on main",  # else its memory would be given to the next copy while kernels still read it
        "2 copied on side",
        "main waits for side",
        "2 used on main",
        "1 copied on side",
        "main waits for side",
        "1 used on main",
    ]


def test_what_comes_from_another_device_is_copied_on_the_stream_that_made_it(streams):
    prefetch([MicroBatch(on("cuda:1", 3, streams), range(3))], torch.device("cuda:0"))(0)
    assert streams.events[0] == "3 copied on main"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_copies_arrive_before_they_are_used():
    host = torch.randn(64, 512, 512).pin_memory()
    device = torch.device("cuda", torch.cuda.current_device())
    take = prefetch(split_rows(host, 8), device)
    layer = nn.Linear(512, 512, device=device)
    for index in range(8):
        batch = take(index)
        layer(batch)
        assert torch.equal(batch.cpu(), host[8 * index : 8 * index + 8])
