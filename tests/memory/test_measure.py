"""Peak memory of tensors: counted by hand first, then by `measure_peak`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold.memory.measure import PeakMemory
from gradfold.memory.tracker import AllocationTrace, MemoryBreakdown

FLOAT = 4
ROWS, IN, HIDDEN = 64, 8, 512


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))


def mean_square(model, batch):
    return model(batch).square().mean()


NUM_PARAMETERS = IN * HIDDEN + HIDDEN + HIDDEN + 1


def test_one_backward_pass_takes_what_one_counts_by_hand():
    model, batch = perceptron(), torch.randn(ROWS, IN)
    peak = gradfold.measure_peak(lambda: mean_square(model, batch).backward(), model=model)
    # Most is in use where tanh's backward pass makes its gradient: there are tanh's output, which it needs, the
    # gradient of that, and the one that it makes. The rest is one column wide.
    wide, narrow = ROWS * HIDDEN * FLOAT, ROWS * FLOAT
    assert peak.measured_by == "tensor storage"
    assert peak.breakdown.parameters == NUM_PARAMETERS * FLOAT
    assert peak.breakdown.inputs == ROWS * IN * FLOAT
    assert peak.breakdown.optimizer_state == 0
    assert peak.breakdown.saved_activations in range(wide, wide + 3 * narrow)
    assert peak.breakdown.temporaries in range(2 * wide, 2 * wide + 3 * narrow)
    assert peak.breakdown.gradients == (HIDDEN + 1) * FLOAT  # of the second layer alone
    assert peak.peak_bytes == peak.breakdown.total


def test_an_update_is_a_phase_of_its_own():
    model, batch = perceptron(), torch.randn(4, IN)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def update():
        optimizer.zero_grad()
        mean_square(model, batch).backward()
        optimizer.step()

    first = gradfold.measure_peak(update, model=model)
    second = gradfold.measure_peak(update, model=model, optimizer=optimizer)
    size = NUM_PARAMETERS * FLOAT
    for peak in (first, second):
        found = peak.by_phase["update"]
        assert (found.parameters, found.gradients, found.optimizer_state) == (size, size, size)
    assert first.by_phase["forward and backward"].optimizer_state == 0  # it comes with the first step
    assert second.by_phase["forward and backward"].optimizer_state == size
    assert first.by_phase["update"].gradients == size  # those of before are gone by then


def test_memory_is_flat_in_the_number_of_micro_batches():
    peaks = []
    for num_micro_batches in (2, 64):
        model = perceptron()
        optimizer = torch.optim.Adam(model.parameters())
        step = gradfold.TrainStep(gradfold.Accumulator(model, mean_square, micro_batch_size=16), optimizer)
        batch = torch.randn(16 * num_micro_batches, IN)
        step(batch)
        peak = gradfold.measure_peak(lambda step=step, batch=batch: step(batch), model=model, optimizer=optimizer)
        peaks.append(peak.peak_bytes - peak.breakdown.inputs)  # which are on the host: here that is the same memory
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)


def test_a_loop_that_keeps_its_graphs_is_seen():
    model, batch = perceptron(), torch.randn(16, IN)

    def backward_last(num):
        for loss in [mean_square(model, batch) for _ in range(num)]:
            loss.backward()

    few, many = (gradfold.measure_peak(lambda num=num: backward_last(num)) for num in (2, 8))
    assert many.breakdown.saved_activations - few.breakdown.saved_activations >= 6 * 16 * HIDDEN * FLOAT


def test_checkpointing_saves_less():
    layers = [nn.Sequential(*[nn.Linear(64, 64), nn.Tanh()] * 4) for _ in range(4)]
    model, batch = nn.Sequential(*layers), torch.randn(256, 64)

    def run(through):
        x = batch
        for layer in model:
            x = through(layer, x)
        x.square().mean().backward()
        model.zero_grad()

    plain = gradfold.measure_peak(lambda: run(lambda layer, x: layer(x)), model=model)
    spared = gradfold.measure_peak(lambda: run(lambda layer, x: checkpoint(layer, x, use_reentrant=False)), model=model)
    assert spared.breakdown.saved_activations < 0.6 * plain.breakdown.saved_activations
    assert spared.peak_bytes < plain.peak_bytes


def test_shared_and_frozen_parameters_count_once():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32))
    model[2].weight = model[0].weight
    model[1].requires_grad_(False)
    peak = gradfold.measure_peak(lambda: mean_square(model, torch.randn(2, 32)).backward(), model=model)
    assert peak.breakdown.parameters == (2 * 32 * 32 + 3 * 32) * FLOAT
    after = gradfold.measure_peak(lambda: None, model=model)
    assert after.breakdown.gradients == (32 * 32 + 2 * 32) * FLOAT


def test_sparse_gradients_are_gradients():
    model = nn.Embedding(1000, 16, sparse=True)
    rows = torch.tensor([3, 5, 3])
    gradfold.measure_peak(lambda: model(rows).sum().backward(), model=model)
    after = gradfold.measure_peak(lambda: None, model=model)
    assert after.breakdown.gradients == 3 * 16 * FLOAT + 3 * 8


def test_parameters_are_known_without_a_model():
    model, batch = perceptron(), torch.randn(ROWS, IN)
    told = gradfold.measure_peak(lambda: mean_square(model, batch).backward(), model=model)
    model.zero_grad()
    assert gradfold.measure_peak(lambda: mean_square(model, batch).backward()).breakdown == told.breakdown


def test_what_is_ignored_does_not_count():
    data = torch.randn(10000, IN)
    model = perceptron()

    def train():
        mean_square(model, data.index_select(0, torch.arange(4))).backward()

    counted = gradfold.measure_peak(train, model=model)
    model.zero_grad()
    spared = gradfold.measure_peak(train, model=model, ignore=[data])
    assert counted.breakdown.inputs - spared.breakdown.inputs == 10000 * IN * FLOAT


def test_storage_that_is_resized_counts_as_it_stands():
    """As fully_shard frees whole parameters, and takes them again; no operator shows that."""
    whole = torch.empty(1000)

    def free_and_take():
        whole.add_(1)
        whole.untyped_storage().resize_(0)
        half = torch.ones(500)
        del half
        whole.untyped_storage().resize_(3000 * FLOAT)
        whole.untyped_storage().resize_(1000 * FLOAT)
        torch.ones(2500)

    assert gradfold.measure_peak(free_and_take).peak_bytes == 3500 * FLOAT
    whole.untyped_storage().resize_(0)

    def take():
        whole.untyped_storage().resize_(1000 * FLOAT)
        whole.zero_()

    peak = gradfold.measure_peak(take)
    assert (peak.peak_bytes, peak.breakdown.parameters) == (1000 * FLOAT, 1000 * FLOAT)
    assert "resize_" not in vars(torch.UntypedStorage)


def test_a_failure_comes_out_and_leaves_no_hook():
    model = perceptron()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ZeroDivisionError):
        gradfold.measure_peak(lambda: 1 / 0, model=model)
    mean_square(model, torch.randn(2, IN)).backward()
    optimizer.step()  # would go through the hooks of a tracker


def test_the_result_as_json():
    peak = gradfold.measure_peak(lambda: torch.zeros(100))
    assert PeakMemory.from_json(peak.to_json()) == peak
    assert peak.peak_bytes == 400


def test_a_trace_says_when_most_was_in_use():
    trace = AllocationTrace()
    trace.begin("forward and backward")
    trace.add(100, "parameters", is_initial=True)
    a = trace.add(50, "temporaries")
    trace.free(a)
    trace.begin("update")
    b = trace.add(30, "optimizer_state")
    trace.free(b)
    trace.begin("forward and backward")
    expected = {
        "forward and backward": MemoryBreakdown(parameters=100, temporaries=50),
        "update": MemoryBreakdown(parameters=100, optimizer_state=30),
    }
    trace.add(20, "temporaries")
    assert trace.peaks() == expected
    assert trace.peaks([100, 5, 30, 20])["forward and backward"] == MemoryBreakdown(parameters=100, temporaries=20)


def test_rows_are_flattened_once():
    """Views and changes in place take nothing."""
    x = torch.randn(100)
    peak = gradfold.measure_peak(lambda: F.relu(x.view(10, 10), inplace=True).t()[2:].mul_(2))
    assert peak.peak_bytes == 400
