"""A training of several ranks that goes on from its last checkpoint; a rank may be told to kill itself.

torchrun --nproc-per-node 2 resumable_training.py FOLDER [UPDATE]
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradfold

NUM_UPDATES, ROWS = 6, (7, 12)


def train(folder, kill_at=None):
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)).double()
    optimizer = torch.optim.Adam(model.parameters())
    num_runs = 0

    def loss_fn(model, batch):
        nonlocal num_runs
        num_runs += 1
        if rank == 1 and step.updates == kill_at and num_runs % 3 == 2:  # in the middle of the window
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    accumulator = gradfold.Accumulator(DistributedDataParallel(model), loss_fn, micro_batch_size=4)
    step = gradfold.TrainStep(accumulator, optimizer)
    path = folder / f"{rank}.pt"  # random state and what an accumulator has learned are a rank's own
    if (folder / "0.pt").exists():
        checkpoint = torch.load(path, weights_only=True)
        for name, part in (("model", model), ("optimizer", optimizer), ("step", step)):
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["random"])
        print(f"rank {rank} goes on at update {step.updates}", flush=True)
    while step.updates < NUM_UPDATES:
        generator = torch.Generator().manual_seed(100 * step.updates + rank)
        step(tuple(torch.randn(ROWS[rank], size, generator=generator).double() for size in (4, 1)))
        parts = {"model": model, "optimizer": optimizer, "step": step}
        state = {name: part.state_dict() for name, part in parts.items()} | {"random": torch.get_rng_state()}
        torch.save(state, path.with_suffix(".new"))
        dist.barrier()  # both are written
        path.with_suffix(".new").replace(path)
        dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    train(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
    dist.destroy_process_group()
