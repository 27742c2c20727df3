"""The walk through the autograd graph: every node once, and the tensors that a backward pass accumulates into."""

from __future__ import annotations

import torch
from torch import nn

from gradfold.engine.graph import graph_leaves, walk


def test_leaves_are_what_a_backward_pass_gives_a_gradient():
    model, outside = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.ones(1, requires_grad=True)
    model[0].bias.requires_grad_(False)
    loss = (model(torch.randn(5, 3)) * outside).mean()
    leaves = graph_leaves([loss])
    loss.backward()
    with_gradient = [tensor for tensor in [*model.parameters(), outside] if tensor.grad is not None]
    assert set(map(id, leaves)) == set(map(id, with_gradient)) and len(leaves) == 4


def test_nodes_that_are_reached_twice_come_once():
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    assert len(list(walk([(y + y).grad_fn, y.grad_fn]))) == 3  # add, mul, x


def test_tensors_without_a_graph_have_no_nodes():
    assert list(walk([torch.ones(2).grad_fn])) == []
