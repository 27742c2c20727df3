"""Attributes of modules, put back: what they are bound to, and what is inside of containers and tensors."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import nn

import gradfold
from gradfold.state.attributes import ModuleAttributes
from gradfold.state.external import ExternalState


def bind(module, kept):
    module.kept = [0]


def unbind(module, kept):
    del module.kept


def put_in(module, kept):
    if isinstance(kept, dict):
        kept["masks"] = torch.ones(3)
    elif isinstance(kept, set):
        kept.add(torch.ones(3))
    else:
        kept.append(torch.ones(3))


def empty(module, kept):
    kept.clear()


@pytest.mark.parametrize("change", [bind, unbind, put_in, empty])
@pytest.mark.parametrize("make", [list, deque, set, lambda items: dict(zip(["masks", "sums"], items, strict=True))])
def test_containers_hold_the_same_tensors_again(make, change):
    """Which have no truth value, so containers of them cannot be compared."""
    module, items = nn.Linear(2, 2), [torch.zeros(3), torch.zeros(3)]
    module.kept = kept = make(items)
    saved = ModuleAttributes([module])
    change(module, kept)
    saved.restore()
    assert module.kept is kept
    assert set(map(id, kept.values() if isinstance(kept, dict) else kept)) == set(map(id, items))


def test_tensors_get_their_contents_back_and_new_attributes_go():
    module = nn.Linear(2, 2)
    module.total = total = torch.zeros(3)
    saved = ModuleAttributes([module])
    total.add_(1)
    module.total, module.other = torch.ones(3), 1
    saved.restore()
    assert module.total is total and total.tolist() == [0, 0, 0] and not hasattr(module, "other")


def test_an_expanded_tensor_which_cannot_be_written_to_is_left_alone():
    module, base = nn.Linear(2, 2), torch.zeros(1)
    module.rows = base.expand(3)
    saved = ModuleAttributes([module])
    base.add_(1)
    saved.restore()
    assert module.rows.tolist() == [1, 1, 1]


class Cached(nn.Module):
    """Keeps a tensor that every forward pass replaces, in a dict."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.cache = {"calls": torch.zeros(2)}

    def forward(self, batch):
        self.cache["calls"] = self.cache["calls"] + 1
        return self.layer(batch)


def test_the_self_check_leaves_a_cache_of_tensors_as_it_was():
    model, batch = Cached(), torch.randn(12, 3).double()
    gradfold.Accumulator(model, lambda model, batch: model(batch).square().mean(), micro_batch_size=4).backward(batch)
    assert model.cache["calls"].tolist() == [3, 3]


def test_a_step_that_fails_keeps_no_other_from_running():
    class Stubborn(list):
        def clear(self):
            raise RuntimeError("not cleared")

    module = nn.BatchNorm1d(2)
    module.seen = Stubborn()
    state = ExternalState(module)
    module.seen.append(1)
    module(torch.randn(4, 2))
    with pytest.raises(RuntimeError, match="not cleared"):
        state.restore()
    assert module.num_batches_tracked == 0
