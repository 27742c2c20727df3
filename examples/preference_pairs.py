"""Preference pairs (DPO, reward models): all chosen answers stand before all rejected ones, and each pair stays whole.

    -for part in torch.cat([chosen, rejected]).split(8):           # half of a pair here, the other half there
    -    (loss_fn(model, part) / num_parts).backward()
    +accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, batching=gradfold.Stacked(2))
    +accumulator.backward(torch.cat([chosen, rejected]))

A micro-batch is stacked as the batch is: `chunk(2)` finds its chosen and its rejected rows. For pairs in turn (chosen,
rejected, chosen, ...) write `Grouped(2)`, for four answers to each prompt `Grouped(4)` or `Grouped("prompt_id")`.
"""

import torch
from torch import nn
from torch.nn import functional as F

import gradfold

NUM_UPDATES = 20


def make_batch(generator):
    """46 pairs of answers, of which the one closer to a hidden taste was chosen: (92, 16)."""
    taste, answers = torch.ones(16), torch.randn(2, 46, 16, generator=generator)
    is_first = (answers @ taste).argmax(0) == 0
    first, second = answers
    chosen, rejected = torch.where(is_first[:, None], first, second), torch.where(is_first[:, None], second, first)
    return torch.cat([chosen, rejected])


def make_model():
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))


def loss_fn(model, batch):
    """The chosen answer of a pair is to score higher than the rejected one."""
    chosen, rejected = model(batch).squeeze(1).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def main():
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(0), make_model()
    accumulator = gradfold.Accumulator(model, loss_fn, micro_batch_size=8, batching=gradfold.Stacked(2))
    step = gradfold.TrainStep(accumulator, torch.optim.SGD(model.parameters(), lr=0.2))
    for _ in range(NUM_UPDATES):
        result = step(make_batch(generator))
        if step.updates % 5 == 0:
            print(f"update {step.updates}: loss {result.loss:.4f} of {result.num_micro_batches} micro-batches")
    return model


if __name__ == "__main__":
    main()
