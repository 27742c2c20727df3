"""Several processes: DistributedDataParallel, a loss per token, and different numbers of tokens on each rank.

    torchrun --nproc-per-node 2 examples/with_ddp.py

The number of tokens is summed over micro-batches *and* ranks, so every token counts the same. Gradients are summed over
the ranks once per window, and every rank ends with the same bits.

     model = DistributedDataParallel(model)
    -for i, batch in enumerate(loader):                                        # micro-batches of 8 sentences
    -    is_last = (i + 1) % 4 == 0
    -    with contextlib.nullcontext() if is_last else model.no_sync():
    -        (loss_fn(model, batch) / 4).backward()                            # a mean of means of means
    -    if is_last:
    -        optimizer.step()
    -        optimizer.zero_grad()
    +accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, weight=gradfold.token_count("labels"))
    +for batch in loader:                                                      # batches of 32 sentences per rank
    +    optimizer.zero_grad()
    +    accumulator.backward(batch)
    +    optimizer.step()

Without torchrun it trains in one process.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import gradfold

NUM_UPDATES, BATCH_SIZE, NUM_WORDS, LENGTH = 20, 64, 50, 12


def make_batch(number):
    """Sentences of 1 to 12 words; the next word follows from the last one. Padding is not counted."""
    generator = torch.Generator().manual_seed(number)
    words = torch.randint(1, NUM_WORDS, (BATCH_SIZE, 1), generator=generator) + 7 * torch.arange(LENGTH + 1)
    words = words % NUM_WORDS
    labels = words[:, 1:].clone()
    # The first sentences are longer: rank 0 has more tokens than the others.
    lengths = LENGTH - torch.arange(BATCH_SIZE)[:, None] * (LENGTH - 1) // (BATCH_SIZE - 1)
    labels[torch.arange(LENGTH) >= lengths] = -100
    return {"words": words[:, :-1], "labels": labels}


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(NUM_WORDS, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, NUM_WORDS))


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["words"]).flatten(0, 1), batch["labels"].flatten())


def rows_of_this_rank(batch):
    if not dist.is_initialized():
        return batch
    return {name: rows.chunk(dist.get_world_size())[dist.get_rank()] for name, rows in batch.items()}


def main():
    model = make_model()
    trained = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = make_optimizer(model)
    accumulator = gradfold.Accumulator(trained, loss_fn, micro_batch_size=8, weight=gradfold.token_count("labels"))
    step = gradfold.TrainStep(accumulator, optimizer, max_grad_norm=1.0)
    for number in range(NUM_UPDATES):
        result = step(rows_of_this_rank(make_batch(number)))
        if number in (0, NUM_UPDATES - 1) and int(os.environ.get("RANK", 0)) == 0:
            print(f"update {number + 1:2d}: loss {result.loss:.4f} over {result.weight:.0f} tokens of all ranks")
    return model


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
