"""The random state: the same numbers come again, and no generator that is the user's is touched."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from gradfold.state import rng
from gradfold.state.rng import RandomState


def test_the_same_numbers_come_again_as_often_as_wanted():
    state = RandomState.record([])
    first = torch.rand(5), torch.randperm(7), torch.randn(3)
    for _ in range(2):
        state.restore()
        again = torch.rand(5), torch.randperm(7), torch.randn(3)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_normal_number_that_torch_has_in_store_comes_again():
    torch.randn(1)  # normal numbers are made in pairs
    state = RandomState.record([])
    first = torch.randn(3)
    state.restore()
    assert torch.equal(torch.randn(3), first)


def test_drawing_does_not_change_what_was_recorded():
    state = RandomState.record([])
    kept = state.by_device[0][1].clone()
    torch.rand(1000)
    assert torch.equal(state.by_device[0][1], kept)


def test_recording_draws_nothing():
    torch.manual_seed(7)
    RandomState.record([torch.zeros(2)])
    after = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), after)


def test_the_user_s_generators_are_left_alone():
    own = torch.Generator().manual_seed(3)
    state = RandomState.record([nn.Linear(1, 1).weight])
    drawn = random.random(), np.random.random(), torch.rand(1, generator=own).item()
    state.restore()
    assert random.random() != drawn[0]
    assert np.random.random() != drawn[1]
    assert torch.rand(1, generator=own).item() != drawn[2]


class Devices:
    """Stands in for torch.cuda and its like."""

    def __init__(self) -> None:
        self.states: dict[torch.device, torch.Tensor] = {}
        self.reads: list[torch.device] = []

    def get_rng_state(self, device):
        self.reads.append(device)
        return self.states[device].clone()

    def set_rng_state(self, state, device):
        self.states[device] = state


@pytest.fixture
def devices(monkeypatch):
    devices = Devices()
    monkeypatch.setattr(torch, "get_device_module", lambda device: devices)
    return devices


def on(name: str) -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(name), is_cpu=False, is_meta=False)


def test_each_accelerator_that_holds_a_parameter_is_recorded_once_and_restored(devices):
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    devices.states = {first: torch.tensor([1]), second: torch.tensor([2])}
    state = RandomState.record([on("cuda:0"), torch.zeros(1), on("cuda:1"), on("cuda:0")])
    assert sorted(device.index for device in devices.reads) == [0, 1]
    devices.states = {first: torch.tensor([8]), second: torch.tensor([9])}
    state.restore()
    assert devices.states == {first: torch.tensor([1]), second: torch.tensor([2])}


def test_no_accelerator_is_asked_for_parameters_on_the_cpu_or_without_storage(devices):
    RandomState.record([torch.zeros(1), torch.zeros(1, device="meta")]).restore()
    assert devices.reads == []


def test_parameters_that_do_not_exist_yet_are_no_obstacle():
    RandomState.record(nn.LazyLinear(2).parameters()).restore()


@pytest.mark.parametrize("module", [None, SimpleNamespace()])
def test_a_backend_without_a_random_state_has_none_to_keep(monkeypatch, module):
    def find(device):
        if module is None:
            raise RuntimeError(f"Device {str(device)!r} does not have a corresponding module")
        return module

    monkeypatch.setattr(torch, "get_device_module", find)
    rng._has_state.cache_clear()
    device = torch.device("lazy", 0 if module is None else 1)
    state = RandomState.record([SimpleNamespace(device=device, is_cpu=False, is_meta=False)])
    rng._has_state.cache_clear()
    assert len(state.by_device) == 1 and not state.has_moved()  # the CPU
    drawn = torch.rand(2)
    state.restore()
    assert torch.equal(torch.rand(2), drawn)
