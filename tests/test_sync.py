"""Several processes are refused by name; a process group of one is no obstacle."""

from __future__ import annotations

import runpy

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
import gradfold.sync
from gradfold.errors import ModelError, RanksError
from gradfold.sync import refuse_several_ranks


def loss_fn(model, batch):
    return model(batch).square().mean()


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def test_no_process_group_is_the_usual_case():
    refuse_several_ranks()


def test_a_torch_without_distributed_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    runpy.run_path(gradfold.sync.__file__)["refuse_several_ranks"]()  # as imported on such a machine


def test_several_ranks_are_refused_with_their_number_and_what_to_write(two_ranks):
    with pytest.raises(RanksError, match=r"2 processes.*no_sync\(\).*all-reduced count") as caught:
        refuse_several_ranks()
    assert isinstance(caught.value, ModelError)


def test_several_ranks_are_refused_at_both_doors_before_anything_runs(two_ranks):
    model, ran = nn.Linear(2, 1), []
    with pytest.raises(RanksError):
        gradfold.Accumulator(model, lambda *_: ran.append(1)).backward(torch.ones(3, 2))
    with pytest.raises(RanksError):
        next(iter(gradfold.windows([torch.ones(3, 2)], 2, model=model)))
    assert not ran and gradients(model) == {}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_a_group_of_one_process_is_no_obstacle_not_even_with_ddp():
    model, batch = nn.Linear(2, 1).double(), torch.randn(7, 2).double()
    expected = full_batch_gradient(model, lambda model: loss_fn(model, batch))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for wrapped in (model, nn.parallel.DistributedDataParallel(model)):
            model.zero_grad()
            gradfold.Accumulator(wrapped, loss_fn, micro_batch_size=2).backward(batch)
            assert relative_error(gradients(model), expected) < 1e-12
    finally:
        torch.distributed.destroy_process_group()
