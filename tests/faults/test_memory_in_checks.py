"""Memory that runs out in the self-check's own runs, and while these are taken back, once or for a while.

Some operators of each kind of window here; all of them by dev/memory_sweep.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import full_batch_gradient, gradients, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradfold


class Scarcity(TorchDispatchMode):
    """Fails at the operator number `at`, and at the next `lasting` ones that take memory."""

    def __init__(self, at, lasting):
        super().__init__()
        self.left, self.lasting = at, lasting

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        takes_memory = all(one.alias_info is None for one in func._schema.returns)
        if self.left == 0 or (self.left < 0 and self.lasting and takes_memory):
            self.lasting -= self.left < 0
            raise torch.OutOfMemoryError("none left")
        return func(*args, **(kwargs or {}))


class Net(nn.Module):
    """With BatchNorm that is frozen in the self-check, and a buffer that forward passes move."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x):
        self.rows += len(x)
        return self.body(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(()))
        self.register_buffer("rows", torch.zeros(()))

    def forward(self, x):
        self.rows += len(x)
        return self.body(x).tanh()


def entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


CONTRAST = gradfold.TwoPhaseLoss(
    lambda model, batch: model(batch[0]), lambda model, z: (model.scale * torch.pdist(z).square()).neg().exp().mean()
)
KINDS = {"exact": (Net, entropy, {"batch_norm": "exact"}), "two phases": (Scaled, CONTRAST, {})}


@pytest.mark.parametrize("lasting", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_window_is_right_or_rolled_back_and_the_next_one_exact(kind, lasting):
    """In clean-up it left BatchNorm in evaluation mode: the next window was 4 % off, in silence."""
    make, loss_fn, options = KINDS[kind]
    original, batch = make().double(), (torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, 0, 1]))
    expected = full_batch_gradient(original, lambda model: loss_fn(model, batch))
    at, is_over, num_right = 2, False, 0
    while not is_over:
        model = copy.deepcopy(original)
        accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=4, **options)
        scarcity = Scarcity(at, lasting)
        try:
            with scarcity:
                accumulator.backward(batch)
            num_right += 1
            assert relative_error(gradients(model), expected) < 1e-12, at
            assert model.rows == 7, at
        except (torch.OutOfMemoryError, gradfold.DoesNotFitError):
            assert not gradients(model), at
            for now, before in zip(model.buffers(), original.buffers(), strict=True):
                assert torch.equal(now, before), at
        assert all(one.training for one in model.modules()), at
        assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules()), at
        model.zero_grad()
        accumulator.backward(batch)
        assert relative_error(gradients(model), expected) < 1e-12, at
        is_over, at = scarcity.left > 0, at + 29
    assert num_right > 10 or lasting  # else the recovery fails as well
