"""Shards: fully_shard (FSDP2), a transformer whose parameters are spread over the ranks, and a loss per token.

    torchrun --nproc-per-node 2 examples/with_fsdp.py

Each rank holds a part of every parameter and of its gradient. gradfold reduces in every micro-batch, so whole gradients
never have to fit (`fsdp_reduce="per_window"` reduces once per window, at the cost of whole gradients until then). Every
rank takes as many turns as the one with the most micro-batches, and every token of every rank counts the same.

     fully_shard(model)
    -for i, batch in enumerate(loader):                                        # micro-batches of 8 sentences
    -    (loss_fn(model, batch) / 4).backward()                                # a mean of means of means
    -    if (i + 1) % 4 == 0:
    -        clip_grad_norm_(model.parameters(), 1.0)
    -        optimizer.step()
    -        optimizer.zero_grad()
    +accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, weight=gradfold.token_count("labels"))
    +step = gradfold.TrainStep(accumulator, optimizer, max_grad_norm=1.0)
    +for batch in loader:                                                      # batches of 32 sentences per rank
    +    step(batch)

Without torchrun it trains in one process, unsharded.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import gradfold

NUM_UPDATES, BATCH_SIZE, NUM_WORDS, LENGTH, WIDTH = 15, 64, 50, 12, 16


class Tagger(nn.Module):
    """Words in, the next words out."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(NUM_WORDS, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.out = nn.Linear(WIDTH, NUM_WORDS)

    def forward(self, words):
        hidden = self.words(words)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.out(hidden.flatten(0, 1))  # a row per word


def make_model():
    torch.manual_seed(0)
    return Tagger()


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def shard(model):
    """A layer at a time, then the rest: only one layer's parameters are whole at a time."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


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


def loss_fn(model, batch):
    return F.cross_entropy(model(batch["words"]), batch["labels"].flatten())


def rows_of_this_rank(batch):
    """Rank 0 takes three quarters, the others share the rest: uneven on purpose, so that rank 0 has more turns."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return batch
    num_first = BATCH_SIZE * 3 // 4
    if dist.get_rank() == 0:
        return {name: rows[:num_first] for name, rows in batch.items()}
    return {
        name: rows[num_first:].chunk(dist.get_world_size() - 1)[dist.get_rank() - 1] for name, rows in batch.items()
    }


def main():
    model = make_model()
    if dist.is_initialized():
        shard(model)
    optimizer = make_optimizer(model)
    weight = gradfold.token_count("labels")
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, weight=weight, self_check=False)
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
