"""A training on several ranks whose process group outlives its end, in a Python that hands itself over to no thread."""

import sys

import torch
import torch.distributed as dist
from torch import nn

import gradfold

dist.init_process_group("gloo")
model = nn.parallel.DistributedDataParallel(nn.Linear(3, 3))
accumulator = gradfold.Accumulator(model, lambda model, batch: model(batch).mean(), micro_batch_size=2)
accumulator.backward(torch.randn(6, 3))
sys.setswitchinterval(1000)  # a thread that comes late gets its turn when Python ends
accumulator.backward(torch.randn(6, 3))
