"""Hugging Face Accelerate: `backward=accelerator.backward`.

Accelerate keeps placing the model, wrapping the optimizer and running the backward pass; gradfold splits and weighs.
`Accelerator(gradient_accumulation_steps=1)` is required: else Accelerate divides a second time. gradfold tests that
on one scalar before the first batch, and refuses it.

    -accelerator = Accelerator(gradient_accumulation_steps=4)
    +accelerator = Accelerator(gradient_accumulation_steps=1)
     model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    -loader = accelerator.prepare(loader)                                            # batches of 16
    +loader = accelerator.prepare_data_loader(loader, device_placement=False)        # batches of 64
    +fold = gradfold.Accumulator(model, loss_fn, micro_batch_size=16, backward=accelerator.backward)
     for batch in loader:
    -    with accelerator.accumulate(model):
    -        accelerator.backward(loss_fn(model, batch))
    -        if accelerator.sync_gradients:
    -            accelerator.clip_grad_norm_(model.parameters(), 1.0)
    -        optimizer.step()
    -        scheduler.step()
    -        optimizer.zero_grad()
    +    fold.backward(batch)
    +    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    +    optimizer.step()
    +    scheduler.step()
    +    optimizer.zero_grad()

One process, without fp16: a framework that scales the loss does so in its own backward, which is not supported.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import gradfold

NUM_EPOCHS = 3


def make_loader():
    digits = load_digits()
    inputs = torch.tensor(digits.data[:495], dtype=torch.get_default_dtype()) / 16
    data = TensorDataset(inputs, torch.tensor(digits.target[:495]))  # the last batch of an epoch has 47 rows
    return DataLoader(data, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))


def make_model():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def make_optimizer(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=8, gamma=0.5)


def loss_fn(model, batch):
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def main():
    torch.manual_seed(0)
    loader, model = make_loader(), make_model()
    optimizer, scheduler = make_optimizer(model)

    accelerator = Accelerator(gradient_accumulation_steps=1)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    # The global batch may not fit on the device: it stays on the host, and gradfold moves its micro-batches.
    loader = accelerator.prepare_data_loader(loader, device_placement=False)

    fold = gradfold.Accumulator(model, loss_fn, micro_batch_size=16, backward=accelerator.backward)
    for epoch in range(NUM_EPOCHS):
        for batch in loader:
            result = fold.backward(batch)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {result.loss:.4f}, {result.num_micro_batches} micro-batches")
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
