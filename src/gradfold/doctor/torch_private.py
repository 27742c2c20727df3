"""Private names of torch that the doctor uses, as seen in torch 2.13.0 (CPU), and what is lost without each.

`engine_run_backward`: gradfold runs the autograd engine by it. Without it only backward passes by `Tensor.backward` and
`torch.autograd.backward` are recorded.

`BaseDataLoaderIter`: the iterator of every DataLoader. Without it epochs are known from the script's loops alone.

`read_number`: `Tensor.item` beneath the hook on host reads. Without it the doctor would record its own reads.

`ACCUMULATE_GRAD`: name of the node that adds to a leaf's `.grad`. Without it no leaf is found in a graph.

Attributes `_saved_*` of autograd nodes: what an operator keeps for its backward pass. Without them no loss is known to
be a mean, and no BatchNorm is found.
"""

from __future__ import annotations

import torch
from torch.autograd.graph import _engine_run_backward
from torch.utils.data.dataloader import _BaseDataLoaderIter

engine_run_backward = _engine_run_backward
BaseDataLoaderIter = _BaseDataLoaderIter
read_number = torch._C.TensorBase.item
ACCUMULATE_GRAD = "torch::autograd::AccumulateGrad"
