"""Which processes train together; what is refused by name. Real processes are in `distributed/`."""

from __future__ import annotations

import pytest
import torch
from reference import full_batch_gradient, gradients, relative_error
from torch import nn

import gradfold
from gradfold.distributed import ddp as sync
from gradfold.distributed import fsdp
from gradfold.distributed.process_group import wait_for_threads
from gradfold.errors import DistributedError, ModelError, OptionError


def loss_fn(model, batch):
    return model(batch).square().mean()


@pytest.fixture
def two_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("gradfold.accumulator.is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def find(option=None, model=None):
    return sync.find_process_group(list((model or nn.Linear(2, 1)).modules()), torch.device("cpu"), option)


def test_no_process_group_is_the_usual_case():
    assert find() is None


def test_a_torch_without_distributed_is_no_obstacle(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    assert find() is None
    assert fsdp.sharded_modules([nn.Linear(2, 1)]) == []


def test_several_processes_without_a_wrapped_model_are_refused_with_what_to_write(two_ranks):
    with pytest.raises(
        DistributedError, match=r"2 processes.*DistributedDataParallel\(model\).*distributed=False"
    ) as caught:
        find()
    assert isinstance(caught.value, ModelError)
    assert find(False) is None


@pytest.mark.parametrize("distributed", ["all", 2, True])
def test_an_unknown_option_is_refused(distributed):
    with pytest.raises(OptionError, match=r"distributed=.*False"):
        gradfold.Accumulator(nn.Linear(2, 1), loss_fn, distributed=distributed)
    with pytest.raises(OptionError, match=r"distributed=.*False"):
        gradfold.windows([], 2, model=nn.Linear(2, 1), distributed=distributed)


def test_engines_that_own_their_steps_and_fsdp1_are_refused_by_name(two_ranks):
    for name, module in (("DeepSpeedEngine", "deepspeed.runtime.engine"), ("FullyShardedDataParallel", "torch.fsdp")):
        made = type(name, (nn.Linear,), {"__module__": module})(2, 1)
        with pytest.raises(DistributedError, match=name.removesuffix("Engine")):
            find(model=made)


def test_several_ranks_are_refused_at_both_doors_before_anything_runs(two_ranks):
    model, ran = nn.Linear(2, 1), []
    with pytest.raises(DistributedError):
        gradfold.Accumulator(model, lambda *_: ran.append(1)).backward(torch.ones(3, 2))
    with pytest.raises(DistributedError):
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
        # gloo's thread may still hold what was sent, and asks for Python when it drops it: the group that ends with the
        # model waits for that thread, and would do so for ever while it holds Python.
        wait_for_threads()
        torch.distributed.destroy_process_group()
