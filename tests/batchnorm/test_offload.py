"""The offload: what waits in host memory, and what a device would have to hold of a window with exact BatchNorm."""

from __future__ import annotations

import pytest
import torch
from batchnorm.test_exact import exact, whole
from live_bytes import LiveBytes
from reference import gradients, relative_error
from resnet18 import classify, resnet18
from torch import nn

from gradfold.batchnorm import exact as exact_batch_norm
from gradfold.batchnorm.offload import Offload, Parked


@pytest.fixture
def another_memory(monkeypatch):
    """The host plays a device: what it would send to host memory is copied, and the copies are not counted."""
    monkeypatch.setattr(exact_batch_norm, "has_own_memory", lambda device: True)
    counted = []
    to_host = Offload.to_host

    def uncounted(self, tensor):
        if not counted:
            return to_host(self, tensor)
        with counted[-1].not_counted():
            return to_host(self, tensor)

    monkeypatch.setattr(Offload, "to_host", uncounted)
    return counted


def peak_of(run, model, counted):
    model.zero_grad()
    live = LiveBytes()
    counted.append(live)
    with live:
        run()
    counted.clear()
    return live


def test_a_device_holds_little_more_than_one_micro_batch(another_memory):
    """The law: at most 1.6 times the peak of plain micro-batches, gradients included, in float32."""
    torch.manual_seed(0)
    model = resnet18(width=16)
    batch = torch.randn(64, 3, 16, 16), torch.randint(0, 10, (64,))
    accumulator = exact(model, classify, micro_batch_size=4, self_check=False)
    expected = gradients(whole(model, classify, batch))

    def plain():
        for part in zip(*[one.split(4) for one in batch], strict=True):
            (classify(model, part) / 16).backward()

    ours = peak_of(lambda: accumulator.backward(batch), model, another_memory)
    assert relative_error(gradients(model), expected) < 2e-6
    naive = peak_of(plain, model, another_memory)
    full = peak_of(lambda: classify(model, batch).backward(), model, another_memory)
    assert ours.peak < 1.6 * naive.peak < full.peak / 2
    assert ours.elsewhere > full.peak / 2  # on the host


def test_what_is_kept_comes_back_bit_for_bit():
    offload = Offload([], least_bytes=0)
    wide = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for tensor in (wide, wide[:, 1], wide.permute(2, 0, 3, 1), wide.to(torch.bfloat16), wide > 0, wide[0, 0, 0, 0]):
        parked = offload.pack(tensor)
        assert isinstance(parked, Parked) and parked.copy.data_ptr() != tensor.data_ptr()
        back = offload.unpack(parked)
        assert (
            torch.equal(back, tensor) and back.stride() == tensor.stride()
        ) or tensor.stride() != tensor.contiguous().stride()


def test_what_stays_on_the_device():
    layer = nn.Linear(100, 100)
    offload = Offload(layer.parameters())
    small, sparse = torch.randn(3), torch.randn(200, 200).to_sparse()
    for tensor in (layer.weight, layer.weight.detach().t(), small, sparse):
        assert offload.unpack(offload.pack(tensor)) is tensor


def test_a_tensor_that_several_operators_save_is_sent_once():
    offload = Offload([])
    tensor = torch.randn(100, 100)
    assert offload.pack(tensor) is offload.pack(tensor.detach())
    before = offload.pack(tensor)
    tensor.add_(1)
    after = offload.pack(tensor)
    assert after is not before and torch.equal(after.copy, tensor)  # it was changed in place
    address = tensor.data_ptr()
    del tensor
    again = torch.full((100, 100), 3.0)
    if again.data_ptr() == address:  # another tensor in the memory of one that is gone
        assert torch.equal(offload.pack(again).copy, again)


def test_every_activation_of_a_window_goes_through(another_memory):
    torch.manual_seed(0)
    model = resnet18().double()
    batch = torch.randn(9, 3, 8, 8, dtype=torch.float64), torch.randint(0, 10, (9,))
    expected = whole(model, classify, batch)
    exact(model, classify, micro_batch_size=2).backward(batch)
    assert relative_error(gradients(model), gradients(expected)) < 1e-12
