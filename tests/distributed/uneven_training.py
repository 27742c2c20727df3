"""A training on several ranks, of which the last has fewer batches and ends."""

import torch
import torch.distributed as dist
from torch import nn

import gradfold

dist.init_process_group("gloo")
model = nn.parallel.DistributedDataParallel(nn.Linear(3, 3))
accumulator = gradfold.Accumulator(model, lambda model, batch: model(batch).mean(), micro_batch_size=2)
for _ in range(2 if dist.get_rank() == dist.get_world_size() - 1 else 3):
    accumulator.backward(torch.randn(6, 3))
