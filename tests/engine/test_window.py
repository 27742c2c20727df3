"""The engine: the order of events, what stays alive, and what a failed window leaves behind."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from reference import assert_same_state, state
from torch import nn

import gradfold

F = nn.functional


class Diary(nn.Module):
    """A linear layer that writes down when it runs forward and backward, with dropout and a buffer that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.events: list[str] = []

    def forward(self, inputs):
        self.events.append(f"F{len(inputs)}")
        self.calls = self.calls + 1  # rebinds the buffer
        output = self.linear(self.dropout(self.norm(inputs)))
        output.register_hook(lambda gradient: self.events.append(f"B{len(gradient)}"))
        return output


def loss_fn(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def make(rows: int = 5) -> tuple[Diary, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return Diary(), (torch.randn(rows, 3) + 1e4, torch.randn(rows, 1))


def test_each_micro_batch_is_run_forward_and_backward_before_the_next():
    model, batch = make(7)
    options = {"batch_norm": "per_micro_batch", "self_check": False}
    gradfold.Accumulator(model, loss_fn, micro_batch_size=3, **options).backward(batch)
    assert " ".join(model.events) == "F3 B3 F2 B2 F2 B2"


def test_a_micro_batch_that_weighs_nothing_is_not_run():
    model, batch = make(6)
    weights = iter([2, 0, 2])
    options = {"batch_norm": "per_micro_batch", "self_check": False}
    accumulator = gradfold.Accumulator(
        model, loss_fn, micro_batch_size=2, weight=lambda batch: next(weights), **options
    )
    result = accumulator.backward(batch)
    assert " ".join(model.events) == "F2 B2 F2 B2"
    assert (result.num_micro_batches, result.num_samples, result.weight) == (2, 6, 4.0)


def test_a_micro_batch_that_weighs_nothing_is_looked_at_last_where_there_are_metrics():
    model = nn.Linear(1, 1)
    batch = (torch.arange(4.0)[:, None], torch.tensor([0.0, 1, 1, 0]))
    seen = []

    def with_rows(model, batch):
        seen.append((batch[0].flatten().tolist(), torch.is_grad_enabled()))
        loss = (model(batch[0]).squeeze(-1) * batch[1]).sum() / batch[1].sum()  # NaN over nothing
        return loss, {"rows": batch[0].flatten()}

    accumulator = gradfold.Accumulator(model, with_rows, micro_batch_size=1, weight=lambda batch: batch[1].sum())
    result = accumulator.backward(batch)
    assert seen == [([1.0], True), ([2.0], True), ([0.0], False), ([3.0], False)]
    assert result.metrics["rows"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert model.weight.grad.item() == 1.5


class Saved:
    """A tensor that autograd holds for the backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_one_micro_batch_of_activations_is_alive_at_a_time():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    at_start, at_end = [], []

    def pack(tensor):
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    def watched(model, batch):
        at_start.append(len(alive))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            loss = model(batch).mean()
        at_end.append(len(alive))
        return loss

    gradfold.Accumulator(model, watched, micro_batch_size=2, self_check=False).backward(torch.randn(12, 3))
    assert at_start == [0] * 6 and len(set(at_end)) == 1 and at_end[0] > 0


def test_the_graph_of_a_micro_batch_is_gone_before_the_next_one_runs():
    """A loss that is kept keeps its graph; torch frees what the graph saved, not what hangs on it."""
    model = nn.Linear(3, 1)
    losses: list[weakref.ref] = []
    alive = []

    def watched(model, batch):
        alive.append(sum(ref() is not None for ref in losses))
        loss = model(batch).mean()
        losses.append(weakref.ref(loss))
        return loss

    gradfold.Accumulator(model, watched, micro_batch_size=2, self_check=False).backward(torch.randn(8, 3))
    assert alive == [0, 0, 0, 0]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("moment", ["forward", "backward", "collate", "weight"])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("entry", ["empty", "gradients"])
def test_any_exception_leaves_everything_as_it_was(error, moment, at, entry):
    model, (inputs, targets) = make(6)
    if entry == "gradients":
        F.mse_loss(model.linear(inputs), targets).backward()
    count = {"forward": 0, "backward": 0, "collate": 0, "weight": 0}

    def maybe_fail(now):
        torch.rand(1)  # everything also draws random numbers
        count[now] += 1
        if now == moment and count[now] == at + 1:
            raise error(now)

    def failing_loss(model, batch):
        output = model(batch[0])
        maybe_fail("forward")
        output.register_hook(lambda gradient: maybe_fail("backward"))
        return F.mse_loss(output, batch[1])

    def failing_collate(samples):
        maybe_fail("collate")
        return torch.utils.data.default_collate(samples)

    def failing_weight(batch):
        maybe_fail("weight")
        return len(batch[0])

    accumulator = gradfold.Accumulator(
        model,
        failing_loss,
        micro_batch_size=2,
        collate=failing_collate,
        weight=failing_weight,
        batch_norm="per_micro_batch",
        self_check=False,
    )
    before = state(model)
    held = {name: parameter.grad for name, parameter in model.named_parameters()}
    rebound = model.calls
    with pytest.raises(error, match=moment):
        accumulator.backward(list(zip(inputs, targets, strict=True)))
    assert_same_state(state(model), before)
    assert all(parameter.grad is held[name] for name, parameter in model.named_parameters())
    assert model.calls is rebound
    assert model.norm.momentum == 0.1 and not model.norm._forward_hooks and not model.norm._forward_pre_hooks
    assert accumulator.num_windows == 0


def test_a_window_that_failed_can_be_run_again_as_if_nothing_had_happened():
    model, batch = make(6)
    twin = copy.deepcopy(model)
    fail = iter([False, False, True])

    def sometimes(model, batch):
        loss = loss_fn(model, batch)
        if next(fail, False):
            raise Interrupted
        return loss

    options = {"micro_batch_size": 2, "batch_norm": "per_micro_batch", "self_check": False}
    torch.manual_seed(5)
    accumulator = gradfold.Accumulator(model, sometimes, **options)
    with pytest.raises(Interrupted):
        accumulator.backward(batch)
    accumulator.backward(batch)
    torch.manual_seed(5)
    gradfold.Accumulator(twin, loss_fn, **options).backward(batch)
    assert_same_state(state(model), state(twin))


def test_a_buffer_that_only_a_later_window_changes_is_restored_from_then_on():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1)
            self.register_buffer("seen", torch.zeros(1))
            self.windows = 0

        def forward(self, inputs):
            if self.windows >= 1:
                self.seen.add_(1)
            return self.linear(inputs)

    model = Late()
    fail = False

    def loss_fn(model, batch):
        loss = model(batch).mean()
        if fail:
            raise Interrupted
        return loss

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=1, self_check=False)
    accumulator.backward(torch.ones(2, 1))
    model.windows = 1
    fail = True
    with pytest.raises(Interrupted), pytest.warns(RuntimeWarning, match=r"Late\.seen"):
        accumulator.backward(torch.ones(2, 1))
    assert model.seen.item() == 1  # said, not restored
    with pytest.raises(Interrupted):
        accumulator.backward(torch.ones(2, 1))
    assert model.seen.item() == 1  # restored
