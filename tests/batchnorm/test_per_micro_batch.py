"""BatchNorm: refused by name, or by micro-batch with the running statistics of the whole window."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import gradients, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfold

LAYERS = {"1d": (nn.BatchNorm1d, ()), "2d": (nn.BatchNorm2d, (3, 2)), "3d": (nn.BatchNorm3d, (2, 1, 2))}


def loss_fn(model, batch):
    return model(batch).square().mean()


def advanced_by_the_whole_batch(layer: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """A copy of the layer after it saw the whole batch at once: torch's own unbiased statistics."""
    layer = copy.deepcopy(layer)
    layer(inputs)
    return layer


def assert_same_statistics(layer, expected, tolerance):
    torch.testing.assert_close(layer.running_mean, expected.running_mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer.running_var, expected.running_var, rtol=tolerance, atol=tolerance)
    assert torch.equal(layer.num_batches_tracked, expected.num_batches_tracked)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    rows=st.integers(4, 33),
    size=st.integers(2, 12),
    mean=st.sampled_from([0.0, 1e4]),
    momentum=st.sampled_from([0.1, 0.5, None]),
    affine=st.booleans(),
    windows=st.integers(1, 3),
)
def test_running_statistics_advance_once_per_window_by_its_own_moments(
    kind, rows, size, mean, momentum, affine, windows
):
    layer_type, shape = LAYERS[kind]
    assume(kind != "1d" or rows // -(-rows // size) > 1)  # one row has no variance
    torch.manual_seed(rows)
    layer = layer_type(3, momentum=momentum, affine=affine).double()
    model = nn.Sequential(layer, nn.Flatten(1), nn.LazyLinear(1).double())
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=size, batch_norm="per_micro_batch")
    for _ in range(windows):
        batch = torch.randn(rows, 3, *shape, dtype=torch.float64) + mean
        expected = advanced_by_the_whole_batch(layer, batch)
        accumulator.backward(batch)
        assert_same_statistics(layer, expected, 1e-11)


def test_a_mean_of_1e4_in_float32_leaves_the_variance_right():
    layer = nn.BatchNorm1d(3, momentum=1.0)
    batch = torch.randn(33, 3) + 1e4
    model = nn.Sequential(layer, nn.Linear(3, 1))
    gradfold.Accumulator(model, loss_fn, micro_batch_size=4, batch_norm="per_micro_batch").backward(batch)
    exact = batch.double().var(0)
    assert float((layer.running_var - exact).abs().max()) < 2e-3  # E[x^2] - E[x]^2 in float32 would give 8 for 1


def test_the_gradient_is_that_of_micro_batch_statistics():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    batch = torch.randn(10, 3).double()
    twin = copy.deepcopy(model)
    for rows in (batch[:4], batch[4:7], batch[7:]):
        (loss_fn(twin, rows) * len(rows) / 10).backward()
    gradfold.Accumulator(model, loss_fn, micro_batch_size=4, batch_norm="per_micro_batch").backward(batch)
    assert relative_error(gradients(model), gradients(twin)) < 1e-12
    whole = copy.deepcopy(twin)
    whole.zero_grad()
    loss_fn(whole, batch).backward()
    assert relative_error(gradients(model), gradients(whole)) > 1e-3  # which is why it must be asked for


def test_one_micro_batch_is_the_whole_batch_and_needs_no_permission():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    twin = copy.deepcopy(model)
    batch = torch.randn(10, 3)
    loss_fn(twin, batch).backward()
    gradfold.Accumulator(model, loss_fn).backward(batch)
    assert relative_error(gradients(model), gradients(twin)) == 0
    assert_same_statistics(model[0], twin[0], 0)


def test_layers_that_would_see_a_micro_batch_are_refused_by_name():
    model = nn.ModuleDict({"stem": nn.BatchNorm1d(3), "body": nn.Sequential(nn.BatchNorm1d(3), nn.SyncBatchNorm(3))})
    model["frozen"] = nn.BatchNorm1d(3).eval()
    model["no_statistics"] = nn.BatchNorm1d(3, track_running_stats=False).eval()  # batch statistics in any mode
    accumulator = gradfold.Accumulator(model, lambda model, batch: model["stem"](batch).mean(), micro_batch_size=16)
    with pytest.raises(gradfold.BatchNormError) as caught:
        accumulator.backward(torch.randn(33, 3))
    assert caught.value.layers == ("stem", "body.0", "body.1", "no_statistics")
    for words in ("4 layers (stem, body.0, body.1 and 1 more)", "16 rows", "33 of the batch", '"per_micro_batch"'):
        assert words in str(caught.value)
    assert model["stem"].num_batches_tracked == 0 and gradients(model) == {}


def test_a_micro_batch_of_one_row_is_refused_by_layer_and_size():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=2, batch_norm="per_micro_batch")
    with pytest.raises(gradfold.BatchNormError, match=r"BatchNorm in 0 got one value per channel .*\(1, 3\)"):
        accumulator.backward(torch.randn(5, 3))
    assert model[0].num_batches_tracked == 0 and model[0].momentum == 0.1


def test_layers_in_evaluation_mode_are_no_obstacle():
    model = nn.Sequential(nn.BatchNorm1d(3).eval(), nn.Linear(3, 1)).double()
    twin = copy.deepcopy(model)
    batch = torch.randn(10, 3).double()
    loss_fn(twin, batch).backward()
    gradfold.Accumulator(model, loss_fn, micro_batch_size=3).backward(batch)
    assert relative_error(gradients(model), gradients(twin)) < 1e-12
    assert model[0].num_batches_tracked == 0


class CalledTwice(nn.Module):
    """One layer, called on two inputs in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 1)

    def forward(self, batch):
        return self.head(self.norm(input=batch) + self.norm(batch * 3 + 5))


def test_a_layer_that_is_called_twice_advances_twice_as_in_the_full_batch():
    model = CalledTwice().double()
    batch = torch.randn(9, 3).double()
    expected = copy.deepcopy(model)
    expected(batch)
    gradfold.Accumulator(model, loss_fn, micro_batch_size=4, batch_norm="per_micro_batch").backward(batch)
    assert_same_statistics(model.norm, expected.norm, 1e-12)
    assert model.norm.num_batches_tracked == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_run_again_in_backward_count_once(reentrant):
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()

    def checkpointed(model, batch):
        hidden = checkpoint(lambda rows: model[1](model[0](rows)), batch, use_reentrant=reentrant)
        return model[2](hidden).square().mean()

    batch = torch.randn(9, 3).double().requires_grad_()
    expected = copy.deepcopy(model)
    expected(batch)
    gradfold.Accumulator(model, checkpointed, micro_batch_size=4, batch_norm="per_micro_batch").backward(batch)
    assert_same_statistics(model[1], expected[1], 1e-12)


def test_a_layer_that_no_micro_batch_reaches_is_left_alone():
    model = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 1)])
    accumulator = gradfold.Accumulator(
        model, lambda model, batch: model[2](model[0](batch)).mean(), micro_batch_size=4, batch_norm="per_micro_batch"
    )
    accumulator.backward(torch.randn(9, 3))
    assert [layer.num_batches_tracked.item() for layer in model[:2]] == [1, 0]
    assert torch.equal(model[1].running_var, torch.ones(3))


def test_a_lazy_layer_is_made_by_the_window():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(3, 1))
    batch = torch.randn(9, 3)
    gradfold.Accumulator(model, loss_fn, micro_batch_size=4, batch_norm="per_micro_batch").backward(batch)
    assert_same_statistics(model[0], advanced_by_the_whole_batch(nn.BatchNorm1d(3), batch), 1e-6)


def test_a_compiled_model_has_the_same_statistics_or_is_refused():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    compiled = torch.compile(model, backend="eager")
    accumulator = gradfold.Accumulator(compiled, loss_fn, micro_batch_size=4, batch_norm="per_micro_batch")
    for _ in range(3):
        batch = torch.randn(9, 3).double()
        expected = advanced_by_the_whole_batch(model[0], batch)
        accumulator.backward(batch)
        assert_same_statistics(model[0], expected, 1e-12)


def test_a_graph_that_calls_no_hooks_is_refused_by_name():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1))
    norm = model[0]

    def without_hooks(model, batch):
        return model[1](norm.forward(batch)).mean()  # as a scripted or compiled graph would

    accumulator = gradfold.Accumulator(model, without_hooks, micro_batch_size=4, batch_norm="per_micro_batch")
    with pytest.raises(gradfold.BatchNormError, match=r"BatchNorm in 0 ran without calling its hooks"):
        accumulator.backward(torch.randn(9, 3))
    assert norm.num_batches_tracked == 0 and torch.equal(norm.running_mean, torch.zeros(3))
