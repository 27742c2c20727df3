"""The buffers that forward passes change: found by value and identity, put back, and no others copied each time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradfold
from gradfold.state.buffers import BufferKeeper


def opened(model: nn.Module, keeper: BufferKeeper | None = None) -> BufferKeeper:
    keeper = keeper or BufferKeeper()
    keeper.open(list(model.modules()))
    return keeper


def learned(model: nn.Module, run) -> BufferKeeper:
    """A keeper that has seen one window succeed."""
    keeper = opened(model)
    run()
    keeper.learn()
    keeper.close()
    return keeper


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_as(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = dict(model.named_buffers())
    assert now.keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(now[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


class Holder(nn.Module):
    """A layer with buffers, and a way to change them that the test gives."""

    def __init__(self, change=lambda self: None, **buffers):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.change = change
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, inputs):
        self.change(self)
        return self.linear(inputs)


class Copied(TorchDispatchMode):
    """Counts the elements that are copied."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.num_elements += args[0].numel()
        return func(*args, **(kwargs or {}))


INPUTS = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)) + 1e4


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.BatchNorm1d(2), (8, 2)),
        (nn.BatchNorm1d(2, momentum=None), (8, 2)),
        (nn.BatchNorm2d(2), (4, 2, 3, 1)),
        (nn.InstanceNorm1d(2, track_running_stats=True), (4, 2, 3)),
        (nn.Sequential(nn.Identity(), nn.Sequential(nn.BatchNorm1d(2))), (8, 2)),
    ],
)
@pytest.mark.parametrize("windows_before", [0, 1, 2])
def test_running_statistics_are_put_back_though_their_versions_stay(layer, shape, windows_before):
    keeper = BufferKeeper()
    for _ in range(windows_before):
        opened(layer, keeper)
        layer(torch.randn(shape) + 1e4)
        keeper.learn()
        keeper.close()
    before, held = copies(layer), dict(layer.named_buffers())
    opened(layer, keeper)
    layer(torch.randn(shape) + 1e4)
    assert not torch.equal(next(layer.buffers()), next(iter(before.values()))), "the forward pass changes them"
    keeper.restore()
    assert_as(layer, before)
    assert all(buffer is held[name] for name, buffer in layer.named_buffers()), "in the same tensors"


CHANGES = {
    "in place": lambda self: self.ema.add_(1),
    "rebound": lambda self: setattr(self, "ema", self.ema + 1),
    "through .data": lambda self: self.ema.data.add_(1),
    "a view of it": lambda self: self.ema[:1].add_(1),
    "rebound to its equal": lambda self: setattr(self, "ema", self.ema.clone()),
    "deleted": lambda self: delattr(self, "ema"),
    "rebound to None": lambda self: setattr(self, "ema", None),
    "rebound to another shape": lambda self: setattr(self, "ema", torch.zeros(7)),
    "resized in place": lambda self: self.ema.resize_(7).zero_(),
    "resized in place to nothing": lambda self: self.ema.resize_(0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_first_window_that_fails_puts_back_whatever_way_a_buffer_was_changed(change):
    model = Holder(change, ema=torch.zeros(3), constant=torch.ones(3))
    held = model.ema
    keeper = opened(model)
    model(INPUTS)
    keeper.restore()
    assert model.ema is held and model.ema.tolist() == [0, 0, 0]


@pytest.mark.parametrize("fails", [False, True])
def test_a_buffer_that_its_first_forward_pass_sizes(fails):
    def size(model):
        if not model.seen.numel():
            model.seen.resize_(2).zero_()
        model.seen.add_(1)
        model.calls += 1
        if fails and model.calls == 3:
            raise ValueError("a fault")

    model = Holder(size, seen=torch.empty(0))
    model.calls = 0
    accumulator = gradfold.Accumulator(model, lambda model, batch: model(batch).square().mean(), micro_batch_size=2)
    if fails:
        accumulator = gradfold.Accumulator(model, accumulator.loss_fn, micro_batch_size=2, self_check=False)
        with pytest.raises(ValueError, match="a fault"):
            accumulator.backward(INPUTS)
        assert model.seen.shape == (0,)
    else:
        accumulator.backward(INPUTS)
        assert model.seen.tolist() == [4, 4], "the passes of the self-check do not count"


@pytest.mark.parametrize("change", [CHANGES[name] for name in ("in place", "rebound", "through .data", "a view of it")])
def test_what_one_window_changed_a_later_failure_puts_back(change):
    model = Holder(change, ema=torch.zeros(3), constant=torch.ones(3))
    keeper = learned(model, lambda: model(INPUTS))
    held, before = model.ema, copies(model)
    opened(model, keeper)
    model(INPUTS)
    keeper.restore()
    assert model.ema is held
    assert_as(model, before)


def test_a_stride_of_0_over_one_row_is_no_expanded_buffer():
    model = Holder(CHANGES["in place"], ema=torch.zeros(3).as_strided((1, 3), (0, 1)))
    keeper = opened(model)
    model(INPUTS)
    keeper.restore()
    assert model.ema.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("parametrize", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_spectral_norm_is_put_back(parametrize):
    model = parametrize(nn.Linear(3, 4))
    keeper = learned(model, lambda: model(torch.randn(2, 3)))
    before = copies(model)
    opened(model, keeper)
    model(torch.randn(2, 3))
    keeper.restore()
    assert_as(model, before)


def test_a_buffer_that_was_none_is_none_again():
    """A codebook or running mean that the first forward pass makes."""

    def make(self):
        if self.mean is None:
            self.mean = torch.ones(2)

    model = Holder(make, mean=None)
    keeper = opened(model)
    model(INPUTS)
    keeper.restore()
    assert model.mean is None


@pytest.mark.parametrize("how", ["in place", "through .data"])
def test_a_buffer_that_the_first_window_made_is_kept_from_the_second_on(how):
    """The moving average that starts as None: what made it is likely to change it."""

    def average(self):
        if self.ema is None:
            self.ema = torch.zeros(3)
        CHANGES[how](self)

    model = Holder(average, ema=None)
    keeper = learned(model, lambda: model(INPUTS))
    opened(model, keeper)
    model(INPUTS)
    keeper.restore()
    assert model.ema.tolist() == [1, 1, 1]


def test_a_buffer_registered_by_a_forward_pass_is_no_obstacle():
    model = Holder(lambda self: "late" in self._buffers or self.register_buffer("late", torch.zeros(1)))
    keeper = opened(model)
    model(INPUTS)
    keeper.learn()
    keeper.close()
    opened(model, keeper)
    model(INPUTS)
    keeper.restore()
    assert model.late.tolist() == [0]


def test_a_large_constant_is_copied_in_the_first_window_only():
    model = nn.Sequential(Holder(constant=torch.zeros(10_000)), nn.BatchNorm1d(1))
    keeper = BufferKeeper()
    sizes = []
    for _ in range(3):
        with Copied() as copied:
            opened(model, keeper)
        sizes.append(copied.num_elements)
        model(INPUTS)
        keeper.learn()
        keeper.close()
    assert sizes == [10_003, 3, 3]  # mean, variance and count of the BatchNorm


def test_an_evaluating_batch_norm_is_not_copied_again():
    model = nn.BatchNorm1d(2).eval()
    keeper = learned(model, lambda: model(INPUTS))
    with Copied() as copied:
        opened(model, keeper)
    assert copied.num_elements == 0


def test_a_change_of_the_training_flag_starts_over():
    """What evaluation mode leaves alone, training mode may change, also through .data."""
    model = Holder(lambda self: self.training and self.ema.data.add_(1), ema=torch.zeros(2)).eval()
    keeper = learned(model, lambda: model(INPUTS))
    model.train()
    opened(model, keeper)
    model(INPUTS)
    keeper.restore()
    assert model.ema.tolist() == [0, 0]


def test_a_new_module_starts_over():
    model = nn.Sequential(Holder(lambda self: None, ema=torch.zeros(2)))
    keeper = learned(model, lambda: model(INPUTS))
    model.append(Holder(lambda self: self.ema.data.add_(1), ema=torch.zeros(2)))
    opened(model, keeper)
    model[1](INPUTS)
    keeper.restore()
    assert model[1].ema.tolist() == [0, 0]


def test_a_buffer_that_only_a_later_window_changes_is_said_once_and_kept_from_then_on():
    model = Holder(ema=torch.zeros(2), other=torch.zeros(2))
    keeper = learned(model, lambda: model(INPUTS))
    model.change = lambda self: self.ema.add_(1)
    opened(model, keeper)
    model(INPUTS)
    with pytest.warns(RuntimeWarning, match=r"Holder\.ema\. They keep their new values") as caught:
        keeper.restore()
    assert len(caught) == 1 and "other" not in str(caught[0].message)
    opened(model, keeper)
    model(INPUTS)
    keeper.restore()
    assert model.ema.tolist() == [1, 1]


def test_a_later_change_in_a_window_that_succeeds_is_learned_in_silence():
    model = Holder(ema=torch.zeros(2))
    keeper = learned(model, lambda: model(INPUTS))
    model.change = lambda self: self.ema.add_(1)
    for _ in range(2):
        opened(model, keeper)
        model(INPUTS)
        keeper.learn()
        keeper.close()
    opened(model, keeper)
    model(INPUTS)
    keeper.restore()
    assert model.ema.tolist() == [2, 2]


def test_a_buffer_in_two_places_is_copied_once_and_put_back_in_both():
    shared = torch.zeros(1000)
    model = nn.ModuleList([Holder(ema=shared), Holder(CHANGES["rebound"], ema=shared), Holder(ema=shared)])
    with Copied() as copied:
        keeper = opened(model)
    assert copied.num_elements == 1000
    model[1](INPUTS)
    model[0].ema.add_(5)
    keeper.restore()
    assert all(holder.ema is shared for holder in model) and shared.sum().item() == 0


def test_a_module_in_two_places_is_no_obstacle():
    layer = nn.BatchNorm1d(2)
    model = nn.Sequential(layer, layer)
    keeper = opened(model)
    model(INPUTS)
    keeper.restore()
    assert layer.num_batches_tracked.item() == 0 and layer.running_mean.tolist() == [0, 0]


def test_buffers_that_are_not_saved_with_the_model_are_kept_too():
    model = Holder(lambda self: self.cache.add_(1))
    model.register_buffer("cache", torch.zeros(2), persistent=False)
    keeper = opened(model)
    model(INPUTS)
    keeper.restore()
    assert model.cache.tolist() == [0, 0]


def made_in_inference_mode():
    with torch.inference_mode():
        return torch.zeros(2)


KINDS = {
    "not a number": lambda: torch.tensor([math.nan, 1.0]),
    "bool": lambda: torch.tensor([True, False]),
    "int": lambda: torch.tensor([3, 4]),
    "complex": lambda: torch.tensor([1j, 2.0]),
    "half": lambda: torch.ones(2, dtype=torch.float16),
    "bfloat16": lambda: torch.ones(2, dtype=torch.bfloat16),
    "0-d": lambda: torch.tensor(3.0),
    "empty": lambda: torch.zeros(0),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "nothing": lambda: None,
    "with requires_grad": lambda: torch.zeros(2, requires_grad=True),
    "made in inference mode": made_in_inference_mode,
    "expanded": lambda: torch.ones(1).expand(3),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("end", ["close", "restore"])
def test_a_constant_of_any_kind_is_no_obstacle(make, end):
    buffer = make()
    model = Holder(constant=buffer)
    for _ in range(2):
        keeper = opened(model)
        model(INPUTS)
        getattr(keeper, end)()
        assert model.constant is buffer


def test_a_model_without_buffers_costs_nothing():
    with Copied() as copied:
        keeper = opened(nn.Linear(2, 1))
        keeper.learn()
        keeper.close()
    assert copied.num_elements == 0
    keeper.restore()


def test_putting_back_twice_does_it_once():
    model = Holder(CHANGES["in place"], ema=torch.zeros(2))
    keeper = opened(model)
    keeper.restore()
    model(INPUTS)
    keeper.restore()
    assert model.ema.tolist() == [1, 1]


def test_copies_do_not_outlive_their_window():
    model = Holder(CHANGES["in place"], ema=torch.zeros(2))
    keeper = learned(model, lambda: model(INPUTS))
    keeper.restore()  # nothing is open
    assert model.ema.tolist() == [1, 1]


def failing_once_changed(model, batch):
    model(batch)
    raise ZeroDivisionError


@pytest.mark.parametrize("size", [None, 3])
def test_lazy_statistics_are_those_of_a_new_layer_after_a_window_that_failed(size):
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(1))
    accumulator = gradfold.Accumulator(model, failing_once_changed, micro_batch_size=size, batch_norm="per_micro_batch")
    with pytest.raises(ZeroDivisionError):
        accumulator.backward(INPUTS)
    if not isinstance(model[0].running_mean, nn.UninitializedBuffer):
        assert model[0].running_mean.tolist() == [0, 0] and model[0].num_batches_tracked.item() == 0


def test_the_error_of_a_window_is_not_covered_by_one_of_putting_back():
    model = Holder(constant=torch.zeros(1).expand(3))
    with pytest.raises(ZeroDivisionError):
        gradfold.Accumulator(model, failing_once_changed, micro_batch_size=3).backward(INPUTS)
