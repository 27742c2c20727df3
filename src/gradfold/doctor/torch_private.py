"""Private names of torch that the doctor uses, as seen in torch 2.13.0 (CPU), and what is lost without each.

Beside these it reads the attributes `_saved_*` of autograd nodes, which an operator keeps for its backward pass:
without them no loss is known to be a mean, and no BatchNorm is found.
"""

from __future__ import annotations

from torch.autograd.graph import _engine_run_backward
from torch.utils.data.dataloader import _BaseDataLoaderIter

# gradfold runs the autograd engine by it; else only `Tensor.backward` and `torch.autograd.backward` are recorded.
engine_run_backward = _engine_run_backward
BaseDataLoaderIter = _BaseDataLoaderIter  # of every DataLoader; else epochs are known from the script's loops alone
