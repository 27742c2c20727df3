"""A training that is logged per update, and resumes after a kill as if nothing had happened.

    -if (i + 1) % 4 == 0:
    -    optimizer.step()
    -    log[i // 4] = running_loss / 4                             # with the loss of a short window divided, too
    -torch.save({"model": ..., "optimizer": ..., "scheduler": ..., "i": i}, path)
    +result = step(batch)
    +log[step.updates] = (result.loss.item(), result.grad_norm.item())
    +save(path, {"model": ..., "optimizer": ..., "step": step.state_dict(), "random": torch.get_rng_state()})

`step.state_dict()` holds the counters, the scheduler and the accumulator. A checkpoint falls between updates, where no
gradient is half accumulated, and `step.samples` is the position in the data. It is written to a new file, which then
takes the old one's name: a run killed while it writes leaves the old checkpoint whole. This also holds for
the kernel's out-of-memory killer, which no program can catch.
"""

import contextlib
import os
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradfold

NUM_UPDATES, UPDATES_PER_CHECKPOINT, BATCH_SIZE = 40, 10, 100


def rows_from(start, num_samples):
    """The rows of global batches without end, from sample number `start` on: the position in the data is one number."""
    while True:
        epoch, first = divmod(start, num_samples)
        order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(epoch))
        rows = order[first : first + BATCH_SIZE].tolist()  # fewer at the end of an epoch
        yield rows
        start += len(rows)


def batches(inputs, labels, start):
    data = TensorDataset(inputs, labels)
    own = torch.Generator()  # else every new iterator of the loader takes a number from torch's generator
    return DataLoader(data, batch_sampler=rows_from(start, len(data)), generator=own)


def save(path, checkpoint):
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # else the new name may reach the disk before the content does
    new.replace(path)  # atomic: a reader finds the old checkpoint or the new one


def loss_fn(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def train(path, log, killed_at=None):
    torch.manual_seed(0)
    digits = load_digits()
    inputs, labels = torch.tensor(digits.data, dtype=torch.get_default_dtype()) / 16, torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, NUM_UPDATES)
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=32)
    step = gradfold.TrainStep(accumulator, optimizer, scheduler, max_grad_norm=1.0)
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)  # no code is run, whoever wrote it
        for name, part in (("model", model), ("optimizer", optimizer), ("step", step)):
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["random"])  # for dropout
    for batch in batches(inputs, labels, start=step.samples):
        if step.updates == NUM_UPDATES:
            return model
        result = step(batch)
        log[step.updates] = (result.loss.item(), result.grad_norm.item())  # what is done again is logged again
        if step.updates == killed_at:
            raise KeyboardInterrupt
        if step.updates % UPDATES_PER_CHECKPOINT == 0:
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step.state_dict()}
            save(path, {**states, "random": torch.get_rng_state()})


def main():
    log, log_in_parts = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        unbroken = train(Path(folder, "unbroken.pt"), log)
        with contextlib.suppress(KeyboardInterrupt):
            train(Path(folder, "killed.pt"), log_in_parts, killed_at=25)
        resumed = train(Path(folder, "killed.pt"), log_in_parts)
    print("unbroken:   loss {:.6f}, gradient norm {:.6f}".format(*log[NUM_UPDATES]))
    print("in 2 parts: loss {:.6f}, gradient norm {:.6f}".format(*log_in_parts[NUM_UPDATES]))
    return (unbroken, log), (resumed, log_in_parts)


if __name__ == "__main__":
    main()
