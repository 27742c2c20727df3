"""Attributes of modules, put back: what they are bound to, and what is inside of containers and tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque

import pytest
import torch
from reference import gradients, relative_error
from torch import nn

import gradfold
from gradfold.state.attributes import Contents, ModuleAttributes
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


class Frozen(dict):
    """Can be emptied, but not refilled: the configuration of a diffusion model."""

    def update(self, *_):
        raise TypeError("frozen")


class Output(OrderedDict):
    """Keeps its items as attributes as well: the output of a transformer."""

    def __init__(self, **items):
        super().__init__(**items)
        vars(self).update(items)

    def update(self, *_):
        raise TypeError("not an output")


class Checked(list):
    """Is filled in another way."""

    def extend(self, _):
        raise TypeError("use add")


@pytest.mark.parametrize("kept", [Frozen(a=1), Output(hidden=torch.ones(2)), Checked([1, 2])])
@pytest.mark.parametrize("failing", [None, 2])
def test_containers_of_other_kinds_are_never_emptied(kept, failing):
    model, calls, before = nn.Linear(3, 2), [], copy.deepcopy(kept)
    model.config = kept

    def loss_fn(model, batch):
        calls.append(1)
        if len(calls) == failing:
            raise ValueError("a fault")
        return model(batch).square().mean()

    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4)
    if failing is None:
        accumulator.backward(torch.randn(8, 3))
    else:
        with pytest.raises(ValueError, match="a fault"):
            accumulator.backward(torch.randn(8, 3))
    assert model.config is kept and str(list(kept)) == str(list(before))


def test_an_output_that_every_forward_pass_leaves_is_that_of_the_last_micro_batch():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(3, 2), Output(hidden=torch.zeros(1))

        def forward(self, inputs):
            self.last = Output(hidden=self.layer(inputs).detach())
            return self.layer(inputs)

    model, batch = Encoder(), torch.randn(8, 3)
    gradfold.Accumulator(model, lambda model, batch: model(batch).square().mean(), micro_batch_size=4).backward(batch)
    torch.testing.assert_close(model.last.hidden, model.layer(batch[4:]))


def per_sample(store, found):
    """A hook of a module that keeps the squares of what arrives, as for Fisher information."""

    def hook(module, _, grad_output):
        (arrived,) = grad_output
        square = (arrived.T @ arrived).detach()
        if store == "a tensor of a parameter":
            if hasattr(module.weight, "fisher"):
                module.weight.fisher += square
            else:
                module.weight.fisher = square.clone()
        elif store == "a list of a parameter":
            module.weight.__dict__.setdefault("fisher", []).append(square)
        elif store == "a list of the module":
            module.__dict__.setdefault("fisher", []).append(square)
        else:
            found[module] = found.get(module, 0) + square

    return hook


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    "store", ["a tensor of a parameter", "a list of a parameter", "a list of the module", "a dict of the hook"]
)
def test_what_hooks_of_modules_collect_is_what_they_collect_in_a_loop_by_hand(store):
    net, batch = nn.Linear(3, 2).double(), torch.randn(8, 3).double()

    def collected(train):
        model, found = copy.deepcopy(net), {}
        model.register_full_backward_hook(per_sample(store, found))
        train(model)
        kept = found.get(model, getattr(model, "fisher", getattr(model.weight, "fisher", None)))
        return sum(kept) if isinstance(kept, list) else kept

    def loss_fn(model, batch):
        return model(batch).square().mean()

    def by_hand(model):
        for part in batch.split(2):
            (loss_fn(model, part) / 4).backward()

    expected = collected(by_hand)
    ours = collected(lambda model: gradfold.Accumulator(model, loss_fn, micro_batch_size=2).backward(batch))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_a_hook_that_counts_in_its_closure_sees_the_micro_batches_alone():
    model, calls = nn.Linear(3, 2).double(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    reference = copy.deepcopy(model)
    batch = torch.randn(12, 3).double()
    loss_fn = lambda model, batch: model(batch).square().mean()  # noqa: E731
    gradfold.Accumulator(model, loss_fn, micro_batch_size=4).backward(batch)
    assert len(calls) == 3
    loss_fn(reference, batch).backward()
    assert relative_error(gradients(model), gradients(reference)) <= 1e-12


def test_a_step_that_fails_keeps_no_other_from_running(monkeypatch):
    def stubborn(*_):
        raise RuntimeError("not cleared")

    monkeypatch.setattr(Contents, "restore", stubborn)
    module = nn.BatchNorm1d(2)
    module.seen = []
    state = ExternalState(module)
    module.seen.append(1)
    module(torch.randn(4, 2))
    with pytest.raises(RuntimeError, match="not cleared"):
        state.restore()
    assert module.num_batches_tracked == 0
